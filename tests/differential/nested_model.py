"""KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE of an Intel host, Linux 5.3 and 7.1.

On AMD the model has what needs no VMCB: 5.3 has no nested state there, 7.1 one that is not in L2.
"""

from __future__ import annotations

import struct
from dataclasses import replace

from tests.differential.capability_model import Enabled
from tests.differential.entry_model import Entry, HostCaps
from tests.differential.memory_model import MemoryModel
from tests.differential.user_memory import Failed, User
from tests.differential.vcpu_model import LMA, LME, PAE, PG, VcpuModel
from tests.differential.vmcs12_layout import NONE, PAGE, REVISION, USED, Vmcs12

GM, RP, EV, MTF, GIF = 1, 2, 4, 8, 0x100
SMM_GUEST, SMM_VMXON = 1, 2
HEADER = 128
SHADOW_AT = HEADER + PAGE
DEADLINE = (32, 8)
IA32E = 1 << 9
PREEMPTION_TIMER = 0x40
SAVE_PREEMPTION_TIMER = 1 << 22
# Guest state that GET in L2 reads back from the processor and that no model can know without one: pending debug
# exceptions, interruptibility, linear address, DR7 and what the "save" controls add, PDPTEs, CR3, interrupt status.
LIVE = ((184, 24), (216, 32), (248, 8), (416, 8), (432, 8), (528, 8), (560, 8), (912, 4), (928, 4), (980, 2))

# Segments and descriptor tables, which KVM_SET_SREGS sets in L2 and of which the model says nothing.
SEGMENTS = ((448, 80), (840, 72), (964, 16))

Unsaid = tuple[tuple[int, int], ...]


class NestedModel:
    """The nested state of the vCPU."""

    def __init__(self, vcpu: VcpuModel, memory: MemoryModel, enabled: Enabled, caps: HostCaps) -> None:
        self.vcpu, self.memory, self.enabled, self.caps = vcpu, memory, enabled, caps
        self.latest = vcpu.world.latest
        self.vmxon = self.smm_vmxon = self.smm_guest = False
        self.vmxon_pa = self.vmcs12_pa = NONE
        self.evmcs_pending = False
        self.in_guest = self.run_pending = self.mtf_pending = False
        self.deadline: int | None = None
        self.gif = True
        self.vmcs, self.shadow = Vmcs12(), bytearray(PAGE)

    @property
    def exists(self) -> bool:
        """Whether this kernel has the two calls."""
        return self.latest or (self.vcpu.world.intel and self.vcpu.world.nested)

    @property
    def guest_cr0_fixed(self) -> int | None:
        """What CR0 must have while L2 runs."""
        return self._entry(self.vmcs).guest_cr0_fixed if self.in_guest else None

    def _entry(self, vmcs: Vmcs12) -> Entry:
        return Entry(vmcs, self.vcpu, self.memory, self.caps, self.enabled.evmcs, self.run_pending)

    # ---- GET

    def get(self, user: User) -> tuple[int, Unsaid]:
        """KVM_GET_NESTED_STATE; 0 and what is unsaid of the bytes."""
        if not self.exists:
            raise Failed("EINVAL")
        room = user.number(4, 4)
        if not self.vcpu.world.intel:
            return self._get_svm(user, room), ()
        header, has_vmcs12 = self._header()
        size = int.from_bytes(header[4:8], "little")
        if room < size:
            user.write(4, size.to_bytes(4, "little"))
            raise Failed("E2BIG")
        user.write(0, header)
        if not has_vmcs12:
            return 0, ()
        vmcs = Vmcs12(bytes(self.vmcs.raw))
        unsaid: Unsaid = ()
        if self.in_guest:
            self._refresh(vmcs)
            live = LIVE + SEGMENTS * self.vcpu.segments_set
            unsaid = tuple((HEADER + start, length) for start, length in live)
            if self.deadline is None and header[28]:
                unsaid = (*unsaid, DEADLINE)
        # What is beyond the size that the header tells is by docs/nested-state.md given as far as the buffer reaches.
        reach = PAGE if size > HEADER else len(user.reach(HEADER, PAGE))
        user.write(HEADER, bytes(vmcs.raw)[:reach])
        if self.vmcs.shadows:
            reach = PAGE if size > SHADOW_AT else len(user.reach(SHADOW_AT, PAGE))
            user.write(SHADOW_AT, bytes(self.shadow[:reach]))
        return 0, unsaid

    def _refresh(self, vmcs: Vmcs12) -> None:
        """The registers of L2 as they are now: no bit of CR0 or CR4 is L1's, and nothing has run."""
        vmcs["activity"] = 0
        vmcs["guest_cr0"], vmcs["guest_cr4"] = self.vcpu.cr0, self.vcpu.cr4
        vmcs["entry"] = vmcs["entry"] & ~IA32E | IA32E * bool(self.vcpu.efer & LMA)

    def _get_svm(self, user: User, room: int) -> int:
        if room < HEADER:
            user.write(4, HEADER.to_bytes(4, "little"))
            raise Failed("E2BIG")
        user.write(0, struct.pack("<HHI", GIF * self.gif, 1, HEADER).ljust(HEADER, b"\0"))
        return 0

    def _header(self) -> tuple[bytes, bool]:
        """The 128 bytes, and whether a vmcs12 follows: also one that a CPUID without VMX hides from the header."""
        flags = smm = hdr_flags = deadline = 0
        size, vmxon_pa, vmcs12_pa = HEADER, NONE, NONE
        attached = self.evmcs_pending and self.latest
        has_vmcs12 = self.vmcs12_pa != NONE or (attached if self.latest else self.in_guest)
        if self.vcpu.vmx and (self.vmxon or self.smm_vmxon):
            vmxon_pa, vmcs12_pa = self.vmxon_pa, self.vmcs12_pa
            if has_vmcs12:
                size += PAGE + PAGE * (self.in_guest and self.vmcs.shadows)
                flags |= EV * attached
            smm = SMM_VMXON * self.smm_vmxon | SMM_GUEST * self.smm_guest
            if self.in_guest:
                flags |= GM | RP * self.run_pending | MTF * (self.mtf_pending and self.latest)
                if self.latest and self.vmcs["pin"] & PREEMPTION_TIMER:
                    hdr_flags, deadline = 1, self.deadline or 0
        raw = struct.pack("<HHIQQHHIQ", flags, 0, size, vmxon_pa, vmcs12_pa, smm, 0, hdr_flags, deadline)
        return raw.ljust(HEADER, b"\0"), has_vmcs12

    # ---- SET

    def set(self, user: User) -> int:
        """KVM_SET_NESTED_STATE: 0, 1 or 2."""
        if not self.exists:
            raise Failed("EINVAL")
        header = user.read(0, HEADER)
        flags, kind, size = struct.unpack_from("<HHI", header)
        if size < HEADER or flags & ~(0x10F if self.latest else 7) or (flags & RP and not flags & GM):
            raise Failed("EINVAL")
        if not self.vcpu.world.intel:
            return self._set_svm(kind, flags)
        self._check_header(header)
        self.leave()
        vmxon_pa, vmcs12_pa, smm = struct.unpack_from("<QQH", header, 8)
        if vmxon_pa == NONE:
            return 0
        self.vmxon_pa, self.vmxon = vmxon_pa, True
        self.vmcs, self.shadow = Vmcs12(), bytearray(PAGE)
        if size < HEADER + USED:
            if self.latest and (flags & (GM | EV) or vmcs12_pa != NONE):
                raise Failed("EINVAL")
            return 0
        if vmcs12_pa != NONE:
            if vmcs12_pa == vmxon_pa or not self.vcpu.is_page(vmcs12_pa):
                raise Failed("EINVAL")
            self.vmcs12_pa = vmcs12_pa
        elif flags & EV:
            self.evmcs_pending = True
        else:
            raise Failed("EINVAL")
        if smm & SMM_VMXON:
            self.smm_vmxon, self.vmxon = True, False
            self.smm_guest |= bool(smm & SMM_GUEST)
        self._load(self.vmcs.raw, user, HEADER)
        if self.vmcs["revision"] & 0x7FFF_FFFF != REVISION:
            raise Failed("EINVAL")
        if not flags & GM:
            return 0
        self.run_pending, self.mtf_pending = bool(flags & RP), bool(flags & MTF)
        try:
            return self._resume(user, header, size)
        except Failed:
            self.run_pending = False
            raise

    def _set_svm(self, kind: int, flags: int) -> int:
        if kind != 1 or flags & ~(GM | RP | GIF) or flags not in {0, GIF}:
            raise Failed("EINVAL")
        self.gif = bool(flags & GIF)
        return 0

    def _check_header(self, header: bytes) -> None:
        """What leaves the old state alone."""
        flags, kind = struct.unpack_from("<HH", header)
        vmxon_pa, vmcs12_pa, smm, _, hdr_flags = struct.unpack_from("<QQHHI", header, 8)
        allowed = self.vcpu.vmx
        if vmxon_pa == NONE:
            bad = smm or vmcs12_pa != NONE or flags & ~EV
        else:
            bad = not allowed or not self.vcpu.is_page(vmxon_pa)
        if (
            kind != 0
            or bad
            or (smm & SMM_GUEST and flags & GM)
            or smm & ~(SMM_GUEST | SMM_VMXON)
            or (self.latest and hdr_flags & ~1)
            or (flags & (GM | RP) if self.vcpu.smm else smm)
            or (smm & SMM_GUEST and not smm & SMM_VMXON)
            or (flags & EV and not (allowed and self.enabled.evmcs))
        ):
            raise Failed("EINVAL")

    @staticmethod
    def _load(page: bytearray, user: User, offset: int) -> None:
        """What can be copied is copied, also where the rest faults."""
        raw = user.reach(offset, USED)
        page[: len(raw)] = raw
        if len(raw) < USED:
            raise Failed("EFAULT")

    def _resume(self, user: User, header: bytes, size: int) -> int:
        """L2 runs again: shadow vmcs12, the checks of VM entry, and registers."""
        if self.vmcs.shadows:
            if size < SHADOW_AT + USED:
                raise Failed("EINVAL")
            self._load(self.shadow, user, SHADOW_AT)
            if int.from_bytes(self.shadow[:4], "little") != REVISION | 1 << 31:
                raise Failed("EINVAL")
        given = struct.unpack_from("<IQ", header, 28)
        self.deadline = given[1] if given[0] & 1 else None
        if self._entry(self.vmcs).refused():
            raise Failed("EINVAL")
        if not self._enter():
            self.run_pending = False
            return 2 if self.latest else 1
        self.in_guest, self.vcpu.segments_set = True, False
        return 0

    def _enter(self) -> bool:
        """The registers of L2; False where its CR3 cannot be loaded."""
        v, vcpu = self.vmcs, self.vcpu
        if self.run_pending and v["entry"] & 1 << 15:
            vcpu.efer = v["guest_efer"]
        else:
            vcpu.efer = vcpu.efer | LME | LMA if v["entry"] & 1 << 9 else vcpu.efer & ~(LME | LMA)
        vcpu.load_cr0(v["guest_cr0"])
        vcpu.load_cr4(v["guest_cr4"], self.vmxon)
        return self._load_cr3(v["guest_cr3"], nested_ept=v.has2(2), reload=not self.latest)

    def _load_cr3(self, cr3: int, *, nested_ept: bool, reload: bool) -> bool:
        vcpu = self.vcpu
        if cr3 >> vcpu.width and (self.latest or cr3 != vcpu.cr3):
            return False
        pae_paging = vcpu.cr0 & PG and vcpu.cr4 & PAE and not vcpu.efer & LMA
        if pae_paging and reload and not nested_ept:
            table = self.memory.load(cr3 & ~0x1F, 32)
            if table is None or any(entry & 1 for (entry,) in struct.iter_unpack("<Q", table)):
                return False
        vcpu.cr3 = cr3
        return True

    def leave(self) -> None:
        """vmx_leave_nested: L1's registers from the host state, then VMX is off."""
        if self.in_guest:
            self.in_guest = self.run_pending = False
            v, vcpu = self.vmcs, self.vcpu
            if v.shadows:
                self.memory.store(v["link"], bytes(self.shadow))
            if v["exit"] & 1 << 21:
                vcpu.efer = v["host_efer"]
            else:
                vcpu.efer = vcpu.efer | LME | LMA if v["exit"] & 1 << 9 else vcpu.efer & ~(LME | LMA)
            vcpu.load_cr0(v["host_cr0"])
            vcpu.load_cr4(v["host_cr4"], self.vmxon)
            self._load_cr3(v["host_cr3"], nested_ept=False, reload=True)
        if self.vmxon or self.smm_vmxon:
            self.vmxon = self.smm_vmxon = self.evmcs_pending = False
            self.vmcs12_pa = NONE
            self.vmcs, self.shadow = Vmcs12(), bytearray(PAGE)

    def set_smm(self, on: bool) -> None:
        """KVM_SET_VCPU_EVENTS with KVM_VCPUEVENT_VALID_SMM: 7.1 leaves nested mode when it changes."""
        if self.latest and on != self.vcpu.smm:
            self.leave()
        self.vcpu.smm = on


def with_caps(caps: HostCaps, msrs: dict[int, int]) -> HostCaps:
    """The host's capabilities as its MSRs have them."""
    return replace(caps, sec=msrs[0x48B] >> 32, ept=msrs[0x48C], misc=msrs[0x485], vmfunc=msrs.get(0x491, 0))
