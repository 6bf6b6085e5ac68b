"""The commands: which there are, how each is laid out, and who answers it.

``COMMANDS`` is the one table, of which docs/kvmi.md shows what is of interest to users. A handler gets what follows the
vCPU header as its layout has it, and gives the bytes after the error code, or a change that is still to be made; what
cannot be raises Refused, and what ends the connection Broken.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from service.kvmi import events
from service.kvmi.guest import Change, Guest, PageChange, PageRights, SetPages, SwitchSppOn, WriteMemory
from service.kvmi.wire import (
    ALL_RIGHTS,
    EBUSY,
    EINVAL,
    ENOENT,
    ENOSYS,
    EOPNOTSUPP,
    EPERM,
    FULL_BITMAP,
    MAX_PAYLOAD,
    PAGE_SIZE,
    READ,
    V6,
    V7,
    WRITE,
    Broken,
    Refused,
)

# As many PAUSE_VCPU of one vCPU may wait for their event.
MAX_PAUSES = 1001
# Registers that CONTROL_CR takes, and ranges that CONTROL_MSR does.
_CRS = (0, 3, 4)
_MSR_RANGES = (range(0x2000), range(0xC000_0000, 0xC000_2000))
_PAGE_BITS = 12

_ID = struct.Struct("<HHI")  # id, padding
_SWITCH = struct.Struct("<HB5s")  # what, on, padding
_REGISTER_SWITCH = struct.Struct("<B3sI")  # on, padding, which
_ON = struct.Struct("<B7s")  # on, padding
_LIST = struct.Struct("<HHI")  # view, count, padding
_RANGE = struct.Struct("<QQ")  # gpa, size
_LEAF = struct.Struct("<II")
_ACCESS_ENTRY = struct.Struct("<QB7s")
_BITMAP_ENTRY = struct.Struct("<QII")
_GPA = struct.Struct("<Q")
_GVA = struct.Struct("<Q")
_COUNT = struct.Struct("<H6s")
_VIEW = struct.Struct("<H6s")
_REPLIES = struct.Struct("<BBBB4x")  # on, from this reply on, flags, padding
_NOTHING = struct.Struct("")

_VERSION = struct.Struct("<II")
_FEATURES = struct.Struct("<5B3x")  # spp, vmfunc, eptp, ve, singlestep
_REGISTERS_OF = struct.Struct("<II")
_MSR_VALUE = struct.Struct("<IIQ")
# What fits into the reply to GET_REGISTERS beside the registers.
_MOST_MSRS = (MAX_PAYLOAD - 480) // _MSR_VALUE.size


class Connection(Protocol):
    """What handlers ask of the connection that a command came on."""

    guest: Guest
    dialect: str

    def knows_event(self, event: int) -> bool:
        """Whether the dialect has it."""

    def switch_replies(self, on: bool, *, now: bool) -> None:
        """Send replies from the next command on, or with ``now`` from this one's own."""

    def switch_vm_event(self, event: int, on: bool) -> None:
        """Whether the tool wants an event of the machine."""

    def switch_event(self, vcpu: int, event: int, on: bool) -> None:
        """Whether the tool wants an event of a vCPU."""

    def switch_register(self, vcpu: int, register: int, on: bool) -> None:
        """Whether the tool wants to know of loads of a control register, where it has enabled CR."""

    def switch_stepping(self, vcpu: int, on: bool) -> None:
        """Whether the tool wants to know when the access that it is asked about has landed."""

    def pauses(self, vcpu: int) -> int:
        """Pauses of a vCPU whose event has not been sent."""

    def pause(self, vcpu: int) -> None:
        """Send PAUSE when the guest rests and nothing else is to be sent."""

    def set_registers(self, vcpu: int, regs: bytes) -> None:
        """Registers for when the open event of a vCPU is answered. Raises Refused."""


# What the layout gives: numbers, and padding that may be set.
Given = tuple[Any, ...]
Handler = Callable[[Connection, int, Given, bytes], bytes | Change]


@dataclass(frozen=True, slots=True)
class Command:
    """A command. ``layout`` is what follows the vCPU header of one ``of_vcpu``; with ``tail`` more follows it.

    ``replies``: it answers with data, and so cannot be sent while replies are off. ``about`` says what it does here.
    One without a handler is known and not served.
    """

    id: int
    name: str
    layout: struct.Struct = _NOTHING
    handler: Handler | None = None
    of_vcpu: bool = False
    tail: bool = False
    replies: bool = False
    about: str = ""

    @property
    def queries(self) -> bool:
        """Whether it asks for something of the machine, and no vCPU, with nothing behind its layout."""
        return self.replies and not self.of_vcpu and not self.tail


def _about_itself(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    version = _VERSION.pack(1, 0)
    if connection.dialect == V6:
        return version
    return version + _FEATURES.pack(connection.guest.spp(), 0, 0, 0, 1)


def _check_command(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    id, pad, more = given
    row = COMMANDS.get(id)
    if pad or more or row is None:
        raise Refused(EINVAL)
    if row.handler is None:
        raise Refused(EPERM)
    return b""


def _check_event(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    id, pad, more = given
    if pad or more or not connection.knows_event(id):
        raise Refused(EINVAL)
    return b""


def _guest_info(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    return struct.pack("<I12x", connection.guest.vcpus())


def _vcpu_info(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    return bytes(8)


def _pause(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    _, pad = given
    if pad != bytes(7):
        if connection.dialect == V6:
            raise Refused(EINVAL)
        raise Broken("padding of PAUSE_VCPU is set")
    if connection.pauses(vcpu) >= MAX_PAUSES:
        raise Refused(EBUSY)
    connection.pause(vcpu)
    return b""


def _control_vm_events(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    event, on, pad = given
    if pad != bytes(5) or event not in events.OF_THE_VM or not connection.knows_event(event):
        raise Refused(EINVAL)
    connection.switch_vm_event(event, bool(on))
    return b""


def _control_events(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    event, on, pad = given
    if pad != bytes(5) or event not in events.OF_A_VCPU or not connection.knows_event(event):
        raise Refused(EINVAL)
    connection.switch_event(vcpu, event, bool(on))
    return b""


def _control_cr(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    on, pad, register = given
    if pad != bytes(3) or register not in _CRS:
        raise Refused(EINVAL)
    connection.switch_register(vcpu, register, bool(on))
    return b""


def _control_msr(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    _, pad, register = given
    if pad != bytes(3) or not any(register in known for known in _MSR_RANGES):
        raise Refused(EINVAL)
    return b""


def _get_registers(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    count, pad = given
    if pad != bytes(6) or len(rest) != 4 * count or count > _MOST_MSRS:
        raise Refused(EINVAL)
    wanted = struct.unpack(f"<{count}I", rest)
    found = connection.guest.registers(vcpu, wanted)
    head = _REGISTERS_OF.pack(found.mode, 0) + found.regs + found.sregs + _REGISTERS_OF.pack(count, 0)
    return head + b"".join(map(_MSR_VALUE.pack, wanted, (0,) * count, found.msrs))


def _set_registers(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    connection.set_registers(vcpu, rest)
    return b""


def _get_cpuid(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    function, index = given
    return struct.pack("<4I", *connection.guest.cpuid(vcpu, function, index))


def _in_one_page(gpa: int, size: int) -> None:
    if not 1 <= size <= PAGE_SIZE - gpa % PAGE_SIZE:
        raise Refused(EINVAL)


def _read_physical(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    gpa, size = given
    _in_one_page(gpa, size)
    return connection.guest.read(gpa, size)


def _write_physical(connection: Connection, vcpu: int, given: Given, rest: bytes) -> WriteMemory:
    gpa, size = given
    if size > len(rest):
        raise Broken("WRITE_PHYSICAL has fewer bytes than it says")
    _in_one_page(gpa, size)
    if not connection.guest.has_memory(gpa >> _PAGE_BITS):
        raise Refused(ENOENT)
    return WriteMemory(gpa, rest[:size])


def _check_list(given: Given, rest: bytes, entry: struct.Struct, *, spp: bool = True) -> None:
    """The head of a list and its length, in the order of the kernel: padding, count, SPP where it is needed, view."""
    view, count, pad = given
    if pad or not count or len(rest) != count * entry.size:
        raise Refused(EINVAL)
    if not spp or view:
        # No views are offered: one that is named cannot be switched to.
        raise Refused(EOPNOTSUPP)


def _gfns(given: Given, rest: bytes, *, spp: bool = True) -> list[int]:
    _check_list(given, rest, _GPA, spp=spp)
    return [gpa >> _PAGE_BITS for (gpa,) in _GPA.iter_unpack(rest)]


def _pages(connection: Connection, gfns: list[int]) -> list[PageRights]:
    forgotten = PageRights(ALL_RIGHTS, FULL_BITMAP)
    guest = connection.guest
    return [guest.page(gfn) if guest.has_memory(gfn) else forgotten for gfn in gfns]


def _get_page_access(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    return bytes(page.rights for page in _pages(connection, _gfns(given, rest)))


def _set_page_access(connection: Connection, vcpu: int, given: Given, rest: bytes) -> SetPages:
    _check_list(given, rest, _ACCESS_ENTRY)
    changes = []
    for gpa, rights, pad in _ACCESS_ENTRY.iter_unpack(rest):
        wrong = rights > ALL_RIGHTS or pad != bytes(7) or (rights & WRITE and not rights & READ)
        changes.append(PageChange(gpa >> _PAGE_BITS, None if wrong else rights))
    return SetPages(tuple(changes), command="SET_PAGE_ACCESS")


def _control_spp(connection: Connection, vcpu: int, given: Given, rest: bytes) -> SwitchSppOn:
    on, pad = given
    if pad != bytes(7):
        raise Refused(EINVAL)
    if not on or not connection.guest.spp():
        raise Refused(EOPNOTSUPP)
    return SwitchSppOn()


def _get_bitmap(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    gfns = _gfns(given, rest, spp=connection.guest.spp())
    # A page that nobody restricted has no exemptions; 0 says so.
    found = [0 if page.bitmap == FULL_BITMAP else page.bitmap for page in _pages(connection, gfns)]
    return struct.pack(f"<{len(found)}I", *found)


def _set_bitmap(connection: Connection, vcpu: int, given: Given, rest: bytes) -> SwitchSppOn:
    _check_list(given, rest, _BITMAP_ENTRY, spp=connection.guest.spp())
    changes = [
        PageChange(gpa >> _PAGE_BITS, None, None if pad else bitmap)
        for gpa, bitmap, pad in _BITMAP_ENTRY.iter_unpack(rest)
    ]
    # No library has a function for CONTROL_SPP, so that the first bitmap switches it on.
    first_ends = connection.dialect == V6
    return SwitchSppOn(SetPages(tuple(changes), first_ends=first_ends, command="SET_PAGE_WRITE_BITMAP"))


def _max_gfn(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    return struct.pack("<Q", connection.guest.max_gfn())


def _switch_view(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    view, pad = given
    if pad != bytes(6):
        raise Refused(EINVAL)
    if view:
        raise Refused(EOPNOTSUPP)
    return b""


def _get_view(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    return bytes(8)


def _translate(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    (gva,) = given
    return struct.pack("<Q", connection.guest.translate(vcpu, gva))


def _control_singlestep(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    on, pad = given
    if pad != bytes(7):
        raise Refused(EINVAL)
    connection.switch_stepping(vcpu, bool(on))
    return b""


def _control_replies(connection: Connection, vcpu: int, given: Given, rest: bytes) -> bytes:
    on, now, flags, pad = given
    if pad or (flags and connection.dialect == V6):
        raise Broken("padding of CONTROL_CMD_RESPONSE is set")
    connection.switch_replies(bool(on), now=now == 1)
    return b""


_NOT_SERVED = "not served"
COMMANDS = {
    row.id: row
    for row in (
        Command(
            2,
            "GET_VERSION",
            handler=_about_itself,
            replies=True,
            about="version 1; features (`v7`): spp where it is on or can be, singlestep",
        ),
        Command(3, "CHECK_COMMAND", _ID, _check_command, about="EPERM for what is known and not served, EINVAL else"),
        Command(4, "CHECK_EVENT", _ID, _check_event, about="EINVAL for what the dialect does not have"),
        Command(5, "GET_GUEST_INFO", handler=_guest_info, replies=True, about="number of vCPUs"),
        Command(
            6, "GET_VCPU_INFO", handler=_vcpu_info, of_vcpu=True, replies=True, about="TSC frequency 0: it is not known"
        ),
        Command(
            7,
            "PAUSE_VCPU",
            _ON,
            _pause,
            of_vcpu=True,
            about="one PAUSE_VCPU event each; until it is answered no access that asks goes on",
        ),
        Command(8, "CONTROL_VM_EVENTS", _SWITCH, _control_vm_events, about="see the events"),
        Command(9, "CONTROL_EVENTS", _SWITCH, _control_events, of_vcpu=True, about="see the events"),
        Command(
            10,
            "CONTROL_CR",
            _REGISTER_SWITCH,
            _control_cr,
            of_vcpu=True,
            about="CR3: see the events; CR0, CR4: taken, no event comes",
        ),
        Command(11, "CONTROL_MSR", _REGISTER_SWITCH, _control_msr, of_vcpu=True, about="taken, no event comes"),
        Command(
            13,
            "GET_REGISTERS",
            _COUNT,
            _get_registers,
            of_vcpu=True,
            tail=True,
            replies=True,
            about="the vCPU's state as REST and ioctls have set it; 0 for an MSR that it lacks",
        ),
        Command(
            14,
            "SET_REGISTERS",
            _NOTHING,
            _set_registers,
            of_vcpu=True,
            tail=True,
            about="inside a PF event, RIP moved on by up to 15 bytes: RETRY drops the access then; EOPNOTSUPP else",
        ),
        Command(
            15, "GET_CPUID", _LEAF, _get_cpuid, of_vcpu=True, replies=True, about="the leaf that was set, or ENOENT"
        ),
        Command(16, "GET_XSAVE", of_vcpu=True, about=_NOT_SERVED),
        Command(
            17,
            "READ_PHYSICAL",
            _RANGE,
            _read_physical,
            replies=True,
            about="bytes of one page; zeros where nothing was written; ENOENT without a slot",
        ),
        Command(18, "WRITE_PHYSICAL", _RANGE, _write_physical, tail=True, about="as the host writes"),
        Command(19, "INJECT_EXCEPTION", of_vcpu=True, about=_NOT_SERVED),
        Command(20, "GET_PAGE_ACCESS", _LIST, _get_page_access, tail=True, replies=True, about="rights of each page"),
        Command(
            21,
            "SET_PAGE_ACCESS",
            _LIST,
            _set_page_access,
            tail=True,
            about="as `page-access` with `apply-all`, answered by the first error; a page without a slot is left out",
        ),
        Command(22, "GET_MAP_TOKEN", about=_NOT_SERVED),
        Command(23, "GET_MTRR_TYPE", of_vcpu=True, about=_NOT_SERVED),
        Command(24, "CONTROL_SPP", _ON, _control_spp, about="on, where the host can; never off: EOPNOTSUPP"),
        Command(
            25,
            "GET_PAGE_WRITE_BITMAP",
            _LIST,
            _get_bitmap,
            tail=True,
            replies=True,
            about="0 for a page that is not restricted",
        ),
        Command(
            26,
            "SET_PAGE_WRITE_BITMAP",
            _LIST,
            _set_bitmap,
            tail=True,
            about="switches SPP on if it is off; `v6` ends at the first error, `v7` applies all others",
        ),
        Command(
            27,
            "CONTROL_CMD_RESPONSE",
            _REPLIES,
            _control_replies,
            about="replies off and on; while they are off errors vanish",
        ),
        Command(28, "SET_VE_INFO_PAGE", of_vcpu=True, about=_NOT_SERVED),
        Command(29, "GET_MAX_GFN", handler=_max_gfn, replies=True, about="the first page behind all memory slots"),
        Command(30, "SET_EPT_PAGE_CONV", about=_NOT_SERVED),
        Command(31, "GET_EPT_PAGE_CONV", about=_NOT_SERVED),
        Command(32, "SWITCH_EPT_VIEW", _VIEW, _switch_view, of_vcpu=True, about="to view 0, where it is; EOPNOTSUPP"),
        Command(33, "DISABLE_VE", of_vcpu=True, about=_NOT_SERVED),
        Command(34, "GET_EPT_VIEW", handler=_get_view, of_vcpu=True, replies=True, about="0"),
        Command(
            35,
            "TRANSLATE_GVA",
            _GVA,
            _translate,
            of_vcpu=True,
            replies=True,
            about="by the guest's page tables under the vCPU's registers; all ones for nowhere",
        ),
        Command(36, "CONTROL_EPT_VIEW", of_vcpu=True, about=_NOT_SERVED),
        Command(37, "GET_XCR", of_vcpu=True, about=_NOT_SERVED),
        Command(38, "SET_XSAVE", of_vcpu=True, about=_NOT_SERVED),
        Command(39, "QUERY_PHYSICAL", about=_NOT_SERVED),
        Command(41, "ALLOC_GFN", of_vcpu=True, about=_NOT_SERVED),
        Command(42, "FREE_GFN", of_vcpu=True, about=_NOT_SERVED),
        Command(43, "CREATE_EPT_VIEW", of_vcpu=True, about=_NOT_SERVED),
        Command(44, "DESTROY_EPT_VIEW", of_vcpu=True, about=_NOT_SERVED),
        Command(60, "CHANGE_GFN", of_vcpu=True, about=_NOT_SERVED),
        Command(
            63,
            "CONTROL_SINGLESTEP",
            _ON,
            _control_singlestep,
            of_vcpu=True,
            about="SINGLESTEP after the next PF of the vCPU",
        ),
    )
}
# What an unknown command is answered.
UNKNOWN = {V7: ENOSYS, V6: EOPNOTSUPP}
