"""Exit handling: which VM exits KVM handles by itself, and how each is counted (kvm-spp 4).

EPT violations are in ``ept_violation``, misconfigurations in ``ept_misconfiguration``, SPP misses in ``spp_miss``. A
full page-modification log is emptied; an SPPT misconfiguration is an internal error.
"""

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import exits
from engine.cpu.frames import CAP_RESERVE, FIRST_VCPU_FRAME, read_word, write_word
from engine.cpu.memory_slots import space_of
from engine.jit import kernel
from engine.kvm import dirty_harvest
from engine.kvm import resolutions as res
from engine.kvm import state_frame as reg
from engine.kvm.ept_misconfiguration import handle_misconfiguration
from engine.kvm.ept_violation import handle_violation
from engine.kvm.spp_miss import handle_miss


@kernel
def count_exit(tally, reason, qualification):
    """Count a VM exit by kind."""
    if reason == exits.EPT_VIOLATION:
        tally[reg.EPT_VIOLATION] += 1
    elif reason == exits.EPT_MISCONFIGURATION:
        tally[reg.EPT_MISCONFIGURATION] += 1
    elif reason == exits.PML_FULL:
        tally[reg.PML_FULL] += 1
    elif qualification & exits.Q_SPP_MISS:
        tally[reg.SPP_MISS] += 1
    else:
        tally[reg.SPP_MISCONFIGURATION] += 1


@kernel
def block_nmis(m, vcpu, how, qualification):
    """An IRET that had unblocked NMIs is to run again: NMIs are blocked until then, as before it.

    Not where the exit came while an event was delivered, when the bit means nothing (kvm-spp 4).
    """
    if qualification & exits.Q_NMI_UNBLOCKING and not how & acc.DELIVERY:
        frame = FIRST_VCPU_FRAME + vcpu
        write_word(m, frame, ctl.V_INTERRUPTIBILITY, read_word(m, frame, ctl.V_INTERRUPTIBILITY) | ctl.BLOCKING_BY_NMI)


@kernel
def empty_log(m, vcpu):
    """Full page-modification log: its pages are taken note of, and it begins anew (vmx_flush_pml_buffer)."""
    dirty_harvest.empty_buffer(m, vcpu, m.caps[CAP_RESERVE] * 3 // 4)
    return res.LOG_EMPTIED


@kernel
def handle_exit(m, vcpu, gpa, how, reason, qualification, denied, trail, tally):
    """Handle one VM exit; returns a resolution. ``denied`` is what the SPPT refused of the sub-pages touched.

    A violation is about the slots of the address space that the vCPU is in, an SPP miss about those of space 0.
    """
    if reason == exits.EPT_VIOLATION:
        return handle_violation(m, gpa | space_of(m, vcpu), qualification, denied, trail, tally)
    if reason == exits.SPP_EVENT and qualification & exits.Q_SPP_MISS:
        return handle_miss(m, vcpu, gpa, tally)
    if reason == exits.EPT_MISCONFIGURATION:
        return handle_misconfiguration(m, how, trail)
    if reason == exits.PML_FULL:
        return empty_log(m, vcpu)
    return res.INTERNAL_ERROR
