"""The seeded generator: hand-picked edges, then random tables and accesses from weighted recipes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from . import layout
from .draft import (
    ALL_SUBPAGES,
    FREE_IN_GUEST_PTE,
    HIGH_ADDRESS,
    L1E,
    ODD_BITS,
    PDE,
    PTE,
    RIGHTS,
    SPP_BIT,
    WRITE,
    Draft,
)
from .edges import STATES, edges, spoil
from .vectors import EPTP_ACCESSED_DIRTY, SECONDARY_SPP, Kind, Vector

RANDOM_VECTORS = 6000
VALID_RIGHTS = (1, 3, 4, 5, 7)

Recipe = Callable[[Random], Draft]


def generate(seed: int, count: int = RANDOM_VECTORS) -> list[Vector]:
    """All edges and ``count`` random vectors; the same seed gives the same list."""
    rng = Random(seed)
    vectors = [draft.vector() for draft in edges(rng)]
    recipes, weights = zip(*RECIPES.items(), strict=True)
    vectors += [recipe(rng).vector() for recipe in rng.choices(recipes, weights, k=count)]
    return vectors


def subset(rng: Random) -> int:
    """A vector without odd bits: sparse, half full, dense."""
    density = rng.choice((0.1, 0.5, 0.5, 0.9))
    return sum(1 << 2 * s for s in range(32) if rng.random() < density)


def where(rng: Random, draft: Draft) -> Draft:
    """Any access, sometimes over two sub-pages or two pages."""
    return draft.access(where=rng.choices(("inside", "straddle", "cross"), (8, 1, 1))[0])


def permissive(rng: Random) -> Draft:
    """Nothing stands in the way."""
    draft = where(rng, Draft(rng, "random: permissive", rng.choice((1, 1, 1, 2, 3))))
    draft.table_pte ^= draft.noise(0x300 | 1 << 10 | SPP_BIT)
    for page in range(2):
        draft.guest_flags[page] |= draft.noise(FREE_IN_GUEST_PTE)
    return draft


def restricted(rng: Random) -> Draft:
    """Valid entries with random rights, some not present."""
    draft = where(rng, Draft(rng, "random: restricted", rng.choice((1, 1, 1, 2, 3))))
    for _ in range(rng.randint(1, 3)):
        draft.rights(draft.position(), rng.choice((*VALID_RIGHTS, 0)))
    return draft


def misconfigured(rng: Random) -> Draft:
    """One entry breaks a rule of EPT; others have random rights."""
    leaf = rng.choice((1, 1, 2, 3))
    draft = where(rng, Draft(rng, "random: misconfigured", leaf))
    if rng.random() < 0.5:
        draft.rights(draft.position(), rng.choice((*VALID_RIGHTS, 0)))
    position = draft.position()
    maps_page = position == 4 - leaf
    choice = rng.randrange(4)
    if choice == 0:
        draft.rights(position, rng.choice((2, 6)))
    elif choice == 1 and maps_page:
        draft.ept[0][position] = draft.ept[0][position] & ~0x38 | rng.choice((2, 3, 7)) << 3
    elif choice == 2 and maps_page and leaf > 1:
        draft.flip(position, rng.randint(13, 11 + 9 * (leaf - 1)))
    elif choice == 3 and not maps_page:
        draft.flip(position, rng.randint(3, 6 if position else 7))
    else:
        draft.flip(position, rng.choice(HIGH_ADDRESS))
    if rng.random() < 0.2:
        draft.ept[0][PTE] |= SPP_BIT
        draft.sppt[0][L1E] = ALL_SUBPAGES
    return draft


def eligible(rng: Random) -> Draft:
    """Sub-page permissions decide, and the SPPT is in order: allowed, or a violation by SPP."""
    draft = Draft(rng, "random: eligible")
    draft.store("straddle" if rng.random() < 0.12 else "inside")
    draft.protect(subset(rng), position=draft.position())
    if len(draft.subpages) > 1 and rng.random() < 0.7:
        draft.sppt[0][L1E] |= sum(1 << 2 * s for s in draft.subpages)
    if rng.random() < 0.3:
        draft.rights(draft.position(), 5)
    return draft


def missed(rng: Random) -> Draft:
    """Eligible, but an SPPT entry is not valid; nothing below it matters."""
    draft = Draft(rng, "random: SPP miss").store()
    draft.protect(subset(rng), position=draft.position())
    position = rng.randrange(3)
    draft.sppt[0][position] = rng.choice((0, rng.getrandbits(64), draft.sppt[0][position])) & ~1
    if position < 2:
        draft.sppt[0][position + 1] = rng.getrandbits(64)
    return draft


def spp_misconfigured(rng: Random) -> Draft:
    """Eligible, but a valid SPPT entry has a reserved bit; rarely, the vector has odd bits."""
    draft = Draft(rng, "random: SPP misconfiguration").store()
    draft.protect(subset(rng), position=draft.position())
    if rng.random() < 0.05:
        draft.sppt[0][L1E] |= rng.getrandbits(64) & ODD_BITS | 2
        return draft
    position = rng.randrange(3)
    bits = (*range(1, 12), *HIGH_ADDRESS, *range(52, 64))
    for _ in range(rng.choice((1, 1, 3))):
        draft.sppt[0][position] |= 1 << rng.choice(bits)
    if position < 2:
        draft.sppt[0][position + 1] = rng.getrandbits(64)
    return draft


def crossing(rng: Random) -> Draft:
    """Two pages, each in a random state, sometimes with random vectors."""
    draft = Draft(rng, "random: crossing").access(where="cross")
    for page in range(2):
        spoil(draft, page, rng.choice(STATES))
        if draft.sppt[page][L1E] and rng.random() < 0.5:
            draft.sppt[page][L1E] = subset(rng)
        if rng.random() < 0.2:
            draft.guest_flags[page] = rng.choice((0, 0x61, 0x63, 0x43, 0x23))
    return draft


def guest_paging(rng: Random) -> Draft:
    """Random flags in the guest PTE, over a page in a random state."""
    draft = Draft(rng, "random: guest paging").access()
    draft.guest_flags[0] = rng.getrandbits(64) & (0x66 | FREE_IN_GUEST_PTE) | (rng.random() < 0.85)
    if rng.random() < 0.3:
        draft.guest_flags[0] |= 1 << 63
    if rng.random() < 0.1:
        draft.guest_flags[0] |= 1 << rng.choice(HIGH_ADDRESS)
    spoil(draft, 0, rng.choice(STATES))
    return draft


def guest_table(rng: Random) -> Draft:
    """The page that holds the guest PTEs has random rights and an SPPT path of its own."""
    draft = Draft(rng, "random: guest table").access(where=rng.choice(("inside", "inside", "inside", "cross")))
    value = rng.choice((1, 5, 7, 7, 3, 4, 0, 2, 6))
    draft.table_pte = layout.TEST_PT | value | draft.memory_type() | draft.noise(0x300) | rng.choice((0, SPP_BIT))
    # Without EPT flags Bochs checks no guest A or D update (exclusions.py): mostly leave it none to make.
    on = rng.random() < 0.6
    draft.eptp = draft.eptp & ~EPTP_ACCESSED_DIRTY | (EPTP_ACCESSED_DIRTY if on else 0)
    for page in range(2):
        full = value & WRITE == 0 and not on and rng.random() < 0.8
        draft.guest_flags[page] = 0x63 if full else 0x03 | rng.randrange(4) << 5
    draft.table_sppt[rng.randrange(3)] &= rng.choice((0, 1, (1 << 64) - 1))
    spoil(draft, 0, rng.choice(STATES))
    return draft


def stray(rng: Random) -> Draft:
    """A table pointer of EPT or SPPT leads to zeros, to ones or to no memory."""
    draft = Draft(rng, "random: stray pointer").store()
    draft.protect(subset(rng), position=draft.position())
    target = rng.choice((layout.ZEROS, layout.ONES, layout.ABSENT))
    if rng.random() < 0.5:
        position = rng.randint(draft.top(), PDE)
        draft.ept[0][position] = target | RIGHTS
    else:
        # A vector of all ones has odd bits, which Bochs does not mind: let only zeros stand in for vectors.
        position = rng.randrange(3)
        draft.sppt[0][position] = (layout.ZEROS if position == 2 else target) | layout.SPP_VALID
    return draft


def chaotic(rng: Random) -> Draft:
    """Several small faults anywhere."""
    draft = where(rng, Draft(rng, "random: chaos"))
    draft.protect(subset(rng), position=draft.position())
    draft.rights(PTE, rng.choice((*VALID_RIGHTS, 5, 5)))
    for _ in range(rng.randint(0, 3)):
        choice = rng.randrange(6)
        if choice == 0:
            draft.rights(draft.position(), rng.randrange(8))
        elif choice == 1:
            draft.flip(draft.position(), rng.choice((*range(3, 12), *HIGH_ADDRESS, *range(52, 64))))
        elif choice == 2:
            draft.sppt[0][rng.randrange(3)] ^= 1 << rng.choice((0, 0, *range(1, 12), *range(40, 64)))
        elif choice == 3:
            draft.guest_flags[0] ^= 1 << rng.choice((0, 1, 2, 5, 6, 63))
        elif choice == 4:
            draft.table_pte ^= 1 << rng.choice((0, 1, 2, 3, 8, 9, 45, 61))
        else:
            draft.secondary ^= SECONDARY_SPP
    return draft


def fetched(rng: Random) -> Draft:
    """Fetches and reads of pages that SPP protects: it grants them nothing."""
    draft = Draft(rng, "random: SPP and reads").access(rng.choice((Kind.READ, Kind.FETCH)))
    draft.protect(rng.choice((0, ALL_SUBPAGES)), position=draft.position(), rights=rng.choice((1, 4, 5)))
    draft.sppt[0][rng.randrange(3)] &= rng.choice((0, (1 << 64) - 1))
    return draft


RECIPES: dict[Recipe, float] = {
    permissive: 12,
    restricted: 14,
    misconfigured: 10,
    eligible: 20,
    missed: 9,
    spp_misconfigured: 9,
    crossing: 7,
    guest_paging: 4,
    guest_table: 4,
    stray: 3,
    chaotic: 6,
    fetched: 2,
}
