"""The flush that a hypercall asks for, as KVM reads it: Linux 7.1, and 6.16 too but for ``flush_ranges.KvmLists``.

It checks less than the specification does, in this order, and knows two statuses besides success. It never looks at
flags other than ALL_PROCESSORS (and at that only where processors come as a mask), nor at the address space: every
flush is of all spaces. An empty mask means everyone, an empty sparse set nobody. Ranges are always simple ones.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.arch import hypercall as hv
from engine.hyperv import vp_sets
from engine.hyperv.block import Block
from engine.hyperv.caller import Caller
from engine.hyperv.flush_or_refusal import Flush, Reading, Refused, Undefined
from engine.hyperv.flush_ranges import KvmLists
from engine.hyperv.privileges import Privileges
from engine.hyperv.vp_sets import VpBits
from engine.kvm.memory_views import ReadsMemory

# Longer lists are not read: they flush everything. One place of a queue of 16 is kept for that.
LONGEST_LIST = 15
# Banks beyond those of KVM_MAX_VCPUS name nobody.
MOST_BANKS = 1024 // hv.BANK_VPS

_INVALID = Refused(hv.Status.INVALID_HYPERCALL_INPUT)

Translate = Callable[[int], int | None]


def read(
    caller: Caller, privileges: Privileges, memory: ReadsMemory, lists: KvmLists, translate: Translate | None = None
) -> Reading:
    """Which flush a call is. ``lists`` is how ranges are read.

    ``translate`` is given for a nested guest with nested paging: it turns the GPA of the block, and only that, into one
    of the guest hypervisor; what follows is read from there on.
    """
    if caller.undefined:
        return Undefined()
    control = caller.control
    if not privileges.kvm_allows(control.code):
        return Refused(hv.Status.ACCESS_DENIED)
    if control.value & hv.RESERVED_WITH_NESTED:
        return _INVALID
    if control.fast and control.code in hv.KVM_XMM_CALLS and privileges.enforced and not privileges.xmm_input:
        return Undefined()
    if control.code not in hv.VIRTUAL_CALLS:
        return Refused(hv.Status.INVALID_HYPERCALL_CODE)
    call = hv.CALLS[control.code]
    if not _shape_fits(call, control):
        return _INVALID
    if control.fast:
        return _parse(call, control, Block(None, 0, caller.fast_words), lists)
    gpa = caller.input_gpa if translate is None else translate(caller.input_gpa)
    return _INVALID if gpa is None else _parse(call, control, Block(memory, gpa), lists)


def _shape_fits(call: hv.Call, control: hv.Control) -> bool:
    if not call.sparse and control.variable:
        return False
    if call.rep:
        return control.reps != 0 and control.start == 0
    return control.reps == 0 and control.start == 0


def _parse(call: hv.Call, control: hv.Control, block: Block, lists: KvmLists) -> Reading:
    header = block.read(0, call.header)
    if header is None:
        return _INVALID
    chosen = _sparse_set(control, header, block) if call.sparse else _mask(header)
    if chosen is None:
        return _INVALID
    everyone, vps = chosen
    if not everyone and call.sparse and not control.variable:
        return _flush(control, everyone, vps, None, lists)
    words = None
    if call.rep and control.reps <= LONGEST_LIST:
        words = block.read(call.header + control.variable, control.reps)
        if words is None:
            return _INVALID
    return _flush(control, everyone, vps, words, lists)


def _mask(header: tuple[int, ...]) -> tuple[bool, VpBits]:
    everyone = bool(header[1] & hv.ALL_PROCESSORS) or header[2] == 0
    return everyone, vp_sets.of_mask(header[2])


def _sparse_set(control: hv.Control, header: tuple[int, ...], block: Block) -> tuple[bool, VpBits] | None:
    """(everyone, set); None for a set that is refused. The number of banks counts for "everyone" too."""
    mask = header[3]
    if not vp_sets.banks_fit(mask, control.variable):
        return None
    if header[2] != hv.SET_SPARSE:
        return True, vp_sets.nobody()
    if control.fast and block.read(4, control.variable) is None:
        return None
    banks = block.read(4, min(control.variable, MOST_BANKS))
    return None if banks is None else (False, vp_sets.of_banks(mask, banks))


def _flush(control: hv.Control, everyone: bool, vps: VpBits, words: tuple[int, ...] | None, lists: KvmLists) -> Flush:
    return Flush(
        code=control.code,
        reps=control.reps,
        space=None,
        globals_stay=False,
        everyone=everyone,
        vps=vps,
        covered=None if words is None else lists.covered(words),
        words=words,
    )
