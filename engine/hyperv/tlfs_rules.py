"""The flush that a hypercall asks for, by the letter of the TLFS.

The specification leaves the order of its checks open; this is: mode, privilege, call code, input value, capacity of
registers, place of the block, parameters. Choices where it is silent: a block that registers cannot hold, and the bit
for nested environments outside of one, are invalid input; a set whose banks do not match, an empty or unknown one and
flags that newer headers name are invalid parameters; processors that do not exist are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.arch import hypercall as hv
from engine.hyperv import flush_ranges, vp_sets
from engine.hyperv.block import Block
from engine.hyperv.caller import Caller
from engine.hyperv.flush_or_refusal import (
    Flush,
    Intercepted,
    Reading,
    Refused,
    SecondLevelFlush,
    Undefined,
)
from engine.hyperv.kvm_rules import Translate
from engine.hyperv.privileges import Privileges
from engine.hyperv.vp_sets import VpBits
from engine.kvm.memory_views import ReadsMemory

_FLAGS = hv.ALL_PROCESSORS | hv.ALL_SPACES | hv.NON_GLOBAL_ONLY | hv.EXTENDED_RANGES
_INPUT = Refused(hv.Status.INVALID_HYPERCALL_INPUT)
_ALIGNMENT = Refused(hv.Status.INVALID_ALIGNMENT)
_PARAMETER = Refused(hv.Status.INVALID_PARAMETER)
_SLAT_ROOT = 0x000F_FFFF_FFFF_F000


@dataclass(frozen=True)
class Environment:
    """Facts about the partition: widths of linear and guest-physical addresses, whether its VPs may nest."""

    linear_width: int = 48
    physical_width: int = 46
    nesting: bool = True


def read(
    caller: Caller,
    privileges: Privileges,
    memory: ReadsMemory,
    environment: Environment,
    translate: Translate | None = None,
) -> Reading:
    """Which flush a call is. ``translate`` is as in ``kvm_rules``; an untranslated block is intercepted."""
    control = caller.control
    if caller.undefined or not privileges.enabled:
        return Undefined()
    if control.fast and control.code in hv.XMM_CALLS and not privileges.xmm_input:
        return Undefined()
    if not privileges.tlfs_allows(control.code):
        return Refused(hv.Status.ACCESS_DENIED)
    call = hv.CALLS.get(control.code)
    if call is None:
        return Refused(hv.Status.INVALID_HYPERCALL_CODE)
    if not _input_fits(call, control, privileges):
        return _INPUT
    block = _block(call, control, caller, memory, environment, translate)
    if not isinstance(block, tuple):
        return block
    if call.second_level:
        return _second_level(control, block, environment)
    return _virtual(call, control, block, privileges, environment)


def _input_fits(call: hv.Call, control: hv.Control, privileges: Privileges) -> bool:
    if control.value & hv.RESERVED or (control.nested and not privileges.nested):
        return False
    if control.variable and not call.sparse:
        return False
    if call.rep:
        return control.start < control.reps
    return control.reps == 0 and control.start == 0


def _block(
    call: hv.Call,
    control: hv.Control,
    caller: Caller,
    memory: ReadsMemory,
    environment: Environment,
    translate: Translate | None,
) -> tuple[int, ...] | Refused | Intercepted:
    """The words of the whole block."""
    words = call.header + control.variable + control.reps
    if control.fast:
        return caller.fast_words[:words] if words <= hv.FAST_WORDS else _INPUT
    gpa, size = caller.input_gpa, words * hv.WORD_BYTES
    if gpa % hv.WORD_BYTES or gpa % hv.PAGE + size > hv.PAGE or gpa + size > 1 << environment.physical_width:
        return _ALIGNMENT
    where = gpa if translate is None else translate(gpa)
    found = None if where is None else Block(memory, where).read(0, words)
    return Intercepted(gpa) if found is None else found


def _virtual(
    call: hv.Call, control: hv.Control, block: tuple[int, ...], privileges: Privileges, environment: Environment
) -> Reading:
    space, flags = block[0], block[1]
    if not _flags_fit(call, flags, privileges):
        return _PARAMETER
    if not flags & hv.ALL_SPACES and space >> environment.physical_width:
        return _PARAMETER
    chosen = _sparse_set(control, block) if call.sparse else vp_sets.of_mask(block[2])
    everyone = bool(flags & hv.ALL_PROCESSORS) or (call.sparse and block[2] == hv.SET_ALL)
    if chosen is None or not (everyone or chosen.any()):
        return _PARAMETER
    covered = words = None
    if call.rep:
        words = block[call.header + control.variable + control.start :]
        decode = flush_ranges.extended if flags & hv.EXTENDED_RANGES else flush_ranges.simple
        covered = decode(words, environment.linear_width)
    return Flush(
        code=control.code,
        reps=control.reps,
        space=None if flags & hv.ALL_SPACES else space & _SLAT_ROOT,
        globals_stay=bool(flags & hv.NON_GLOBAL_ONLY),
        everyone=everyone,
        vps=chosen,
        covered=covered,
        words=None if flags & hv.EXTENDED_RANGES else words,
    )


def _flags_fit(call: hv.Call, flags: int, privileges: Privileges) -> bool:
    if flags & ~_FLAGS:
        return False
    if call.rep:
        return not flags & hv.NON_GLOBAL_ONLY and (not flags & hv.EXTENDED_RANGES or privileges.extended_ranges)
    return not flags & hv.EXTENDED_RANGES


def _sparse_set(control: hv.Control, block: tuple[int, ...]) -> VpBits | None:
    """The set, None for one that is refused. The list is found by the number of banks, so it counts for ALL too."""
    kind, mask = block[2], block[3]
    if kind not in (hv.SET_SPARSE, hv.SET_ALL) or not vp_sets.banks_fit(mask, control.variable):
        return None
    return vp_sets.nobody() if kind == hv.SET_ALL else vp_sets.of_banks(mask, block[4 : 4 + control.variable])


def _second_level(control: hv.Control, block: tuple[int, ...], environment: Environment) -> Reading:
    """Flushes of what L1 derived from its own tables; the low 12 bits, attributes in an EPT pointer, do not count."""
    if not environment.nesting:
        return Refused(hv.Status.INVALID_VP_STATE)
    space, flags = block[0], block[1]
    if flags or space >> environment.physical_width:
        return _PARAMETER
    covered = flush_ranges.guest_physical(block[2 + control.start :]) if control.reps else None
    return SecondLevelFlush(control.code, control.reps, space & _SLAT_ROOT, covered)
