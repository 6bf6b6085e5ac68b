"""A vector in the making: well formed and permissive until a recipe spoils something."""

from __future__ import annotations

from random import Random

from . import layout
from .vectors import (
    EPTP_ACCESSED_DIRTY,
    EPTP_DEFAULT,
    READ_MODIFY_WRITES,
    SECONDARY_EPT,
    SECONDARY_SPP,
    Kind,
    Page,
    Vector,
)

READ, WRITE, EXECUTE = 1, 2, 4
RIGHTS = 7
LARGE = 1 << 7
SPP_BIT = 1 << 61
ALL_SUBPAGES = 0x5555_5555_5555_5555
ODD_BITS = ALL_SUBPAGES << 1
SUBPAGE = 128
MEMORY_TYPES = (0, 1, 4, 5, 6)
HIGH_ADDRESS = tuple(range(layout.MAXPHYADDR, 52))

# Positions in a page's ``ept`` and ``sppt``.
PML4E, PDPTE, PDE, PTE = range(4)
L4E, L3E, L2E, L1E = range(4)

# Bits without a meaning here: control or capability off, or software's own. Accessed and dirty flags are among them.
FREE_IN_TABLE = sum(1 << bit for bit in (8, 9, 10, 11, *range(52, 64)))
FREE_IN_LARGE = FREE_IN_TABLE | 1 << 6
FREE_IN_PTE = (FREE_IN_LARGE | 1 << 7) & ~SPP_BIT
FREE_IN_GUEST_PTE = sum(1 << bit for bit in (3, 4, 7, 8, 9, 10, 11, *range(52, 63)))

SIZES = dict.fromkeys(Kind, (1, 2, 4, 8)) | dict.fromkeys((Kind.READ, Kind.WRITE), (1, 2, 4, 8, 8, 16, 32, 64))


class Draft:
    """Two test pages and an access; the lists are there to be changed, ``vector`` freezes them.

    ``leaf`` is the level that maps the first page: 1 for 4 KiB, 2 for 2 MiB, 3 for 1 GiB.
    """

    def __init__(self, rng: Random, origin: str, leaf: int = 1) -> None:
        self.rng = rng
        self.origin = origin
        self.kind = Kind.READ
        self.size = 8
        self.offset = 0
        self.eptp = EPTP_DEFAULT
        self.spptp = layout.SPP_L4
        self.secondary = SECONDARY_EPT | SECONDARY_SPP
        self.gpa = self._choose_gpas(leaf)
        shared = self.gpa[0] >> (3 + 9 * leaf) == self.gpa[1] >> (3 + 9 * leaf)
        self.leaf = [leaf, leaf if shared else 1]
        self.data = [0, 0]
        self.guest_flags = [layout.GUEST_DEFAULT | 4 * rng.randrange(2) for _ in range(2)]
        self.ept: list[list[int]] = [[], []]
        self.sppt: list[list[int]] = [[], []]
        for page in range(2):
            self._fill(page)
        self.table_pte = layout.TEST_PT | layout.EPT_PAGE
        self.table_sppt = [layout.SPP_GUEST_L2 | 1, layout.SPP_GUEST_L1 | 1, ALL_SUBPAGES]
        if rng.random() < 0.25:
            self.eptp |= EPTP_ACCESSED_DIRTY
        if rng.random() < 0.2:
            self.eptp &= ~7

    def _choose_gpas(self, leaf: int) -> list[int]:
        rng = self.rng

        def index(low: int, high: int) -> int:
            return rng.choice((low, high, *(rng.randint(low, high) for _ in range(4))))

        def anywhere() -> int:
            top = rng.randrange(2)
            return top << 39 | index(1 - top, 511) << 30 | index(0, 511) << 21 | index(0, 511) << 12

        first = anywhere()
        if leaf == 3:  # the 1-GByte frame is the one at 0: keep to RAM that holds nothing else
            first = first & ~(0x1FF << 21) | rng.randint(16, 30) << 21
        second = first + layout.PAGE
        if rng.random() < 0.3 or second >> layout.MAXPHYADDR:
            second = anywhere()
            while second == first or (leaf == 3 and second >> 30 == first >> 30):
                second = anywhere()
        return [first, second]

    def _fill(self, page: int) -> None:
        """Default entries of one page, with some noise in the bits that do not matter."""
        gpa, leaf = self.gpa[page], self.leaf[page]
        middle = self.gpa[0] >> 30 == self.gpa[1] >> 30
        last = self.gpa[0] >> 21 == self.gpa[1] >> 21
        pd = layout.FIRST_PD if page == 0 or middle else layout.SECOND_PD
        pt = layout.FIRST_PT if page == 0 or last else layout.SECOND_PT
        l2 = layout.SPP_FIRST_L2 if page == 0 or middle else layout.SPP_SECOND_L2
        l1 = layout.SPP_FIRST_L1 if page == 0 or last else layout.SPP_SECOND_L1
        far = layout.index(gpa, 4)
        frame = self._frame(page)
        top = layout.FAR_PDPT | RIGHTS | self.noise(FREE_IN_TABLE) if far else layout.NEAR_PDPT | layout.EPT_TABLE
        self.ept[page] = [
            top,
            pd | RIGHTS | self.noise(FREE_IN_TABLE),
            pt | RIGHTS | self.noise(FREE_IN_TABLE),
            frame | RIGHTS | self.memory_type() | self.noise(FREE_IN_PTE),
        ]
        self.data[page] = frame
        if leaf > 1:
            base = layout.WINDOW if leaf == 2 else 0
            self.ept[page][4 - leaf] = base | RIGHTS | LARGE | self.memory_type() | self.noise(FREE_IN_LARGE)
            self.data[page] = base | gpa & ((1 << (3 + 9 * leaf)) - 1)
        self.sppt[page] = [
            (layout.SPP_FAR_L3 if far else layout.SPP_NEAR_L3) | layout.SPP_VALID,
            l2 | layout.SPP_VALID,
            l1 | layout.SPP_VALID,
            0,
        ]

    def _frame(self, page: int) -> int:
        """A frame of the window that the other page does not use."""
        while True:
            frame = layout.WINDOW + self.rng.randrange(layout.WINDOW_PAGES) * layout.PAGE
            if page == 0 or frame != self.data[0]:
                return frame

    def noise(self, mask: int) -> int:
        """Random bits of a mask, often none."""
        return self.rng.getrandbits(64) & mask if self.rng.random() < 0.4 else 0

    def memory_type(self) -> int:
        """A valid EPT memory type in bits 5:3, mostly write-back."""
        return self.rng.choice((*MEMORY_TYPES, 6, 6, 6)) << 3

    # ---- the access ------------------------------------------------------------------------------------------------

    def access(self, kind: Kind | None = None, size: int | None = None, where: str = "inside") -> Draft:
        """Choose the access: ``where`` is inside (one sub-page), straddle (two of one page) or cross (two pages)."""
        rng = self.rng
        self.kind = rng.choice(tuple(Kind)) if kind is None else kind
        sizes = [n for n in SIZES[self.kind] if where == "inside" or n > 1]
        self.size = rng.choice(sizes) if size is None else size
        if where == "inside":
            start = rng.randrange(0, layout.PAGE, SUBPAGE)
            last = SUBPAGE - self.size
            self.offset = start + rng.choice((0, last, rng.randint(0, last), rng.randint(0, last)))
        else:
            edge = layout.PAGE if where == "cross" else rng.randrange(SUBPAGE, layout.PAGE, SUBPAGE)
            self.offset = edge - rng.randint(1, self.size - 1)
        return self

    def store(self, where: str = "inside") -> Draft:
        """Choose a write or read-modify-write."""
        kinds = (Kind.WRITE,) * 4 + tuple(READ_MODIFY_WRITES)
        return self.access(self.rng.choice(sorted(kinds)), where=where)

    @property
    def subpages(self) -> list[int]:
        """Sub-pages of the first page that the access touches."""
        last = min(self.offset + self.size, layout.PAGE) - 1
        return list(range(self.offset // SUBPAGE, last // SUBPAGE + 1))

    # ---- spoiling --------------------------------------------------------------------------------------------------

    def top(self, page: int = 0) -> int:
        """First position of ``ept`` that recipes may change: a near page shares its PML4E with the guest itself."""
        return PML4E if layout.index(self.gpa[page], 4) else PDPTE

    def position(self, page: int = 0) -> int:
        """A random position in the EPT path of a page."""
        return self.rng.randint(self.top(page), 4 - self.leaf[page])

    def rights(self, position: int, rights: int, page: int = 0) -> Draft:
        """Replace R, W and X of one entry."""
        self.ept[page][position] = self.ept[page][position] & ~RIGHTS | rights
        return self

    def flip(self, position: int, *bits: int, page: int = 0) -> Draft:
        """Turn bits of one EPT entry over."""
        for bit in bits:
            self.ept[page][position] ^= 1 << bit
        return self

    def protect(self, vector: int, page: int = 0, position: int | None = None, rights: int | None = None) -> Draft:
        """Make a 4-KByte page eligible: W=0 at ``position`` (default the PTE), bit 61 in the PTE, and its vector."""
        if rights is None:
            rights = self.rng.choice((READ, READ | EXECUTE, READ | EXECUTE))
        self.rights(PTE if position is None else position, rights, page)
        self.ept[page][PTE] |= SPP_BIT
        self.sppt[page][L1E] = vector
        return self

    def vector(self) -> Vector:
        """The finished vector; entries that both pages walk through are the first page's."""
        for position, shift in enumerate((39, 30, 21, 12)):
            if self.gpa[0] >> shift == self.gpa[1] >> shift:
                self.ept[1][position] = self.ept[0][position]
                self.sppt[1][position] = self.sppt[0][position]
        pages = [
            Page(
                gpa=self.gpa[page],
                ept=(self.ept[page][0], self.ept[page][1], self.ept[page][2], self.ept[page][3]),
                sppt=(self.sppt[page][0], self.sppt[page][1], self.sppt[page][2], self.sppt[page][3]),
                guest_pte=self.gpa[page] | self.guest_flags[page],
                data=self.data[page],
            )
            for page in range(2)
        ]
        return Vector(
            origin=self.origin,
            kind=self.kind,
            size=self.size,
            offset=self.offset,
            eptp=self.eptp,
            spptp=self.spptp,
            secondary=self.secondary,
            first=pages[0],
            second=pages[1],
            table_pte=self.table_pte,
            table_sppt=(self.table_sppt[0], self.table_sppt[1], self.table_sppt[2]),
        )
