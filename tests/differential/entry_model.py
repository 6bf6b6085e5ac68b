"""The VM-entry checks that KVM_SET_NESTED_STATE makes of an L2 that runs: controls, host state, guest state.

Linux 5.3 and 7.1, `vmx/nested.c`. All refusals are EINVAL, so that the order of checks is of no account.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.differential.memory_model import MemoryModel
from tests.differential.vcpu_model import CR0_FIXED, LMA, LME, NX, PAE, PCIDE, PE, PG, SCE, VcpuModel
from tests.differential.vmcs12_layout import NONE, REVISION, Vmcs12

MEMORY_TYPES = {0, 1, 4, 5, 6, 7}
# May-be-1 halves of what an enlightened VMCS has fields for (7.1).
EVMCS_MASKS = {
    "pin": 0x3F,
    "proc": 0xFFF9_FFFE,
    "sec": 0xC519_98FE,
    "exit": 0x03BF_FFFF,
    "entry": 0x7_F3FF,
    "vmfunc": 0,
}
# Bits that 5.3 takes from a vCPU's capabilities when the enlightened VMCS is enabled.
TAKEN = {"pin": 0xC0, "sec": 0x0202_6701, "exit": 0x1000, "entry": 0x2000, "vmfunc": 1}
WITH_ERROR_CODE = {8, 10, 11, 12, 13, 14, 17}
EPT, VPID, UNRESTRICTED, X2APIC, APIC_ACCESS, REGISTERS, DELIVERY = 0x2, 0x20, 0x80, 0x10, 0x1, 0x100, 0x200
VMFUNC, SHADOWING, PML, MBEC, TSC_SCALING = 0x2000, 0x4000, 0x2_0000, 0x40_0000, 0x200_0000


@dataclass(frozen=True)
class HostCaps:
    """What the sources leave to the host: its secondary controls, VM functions, EPT and miscellaneous capabilities."""

    sec: int = 0
    ept: int = 0
    misc: int = 0
    vmfunc: int = 0


def must_may(latest: bool) -> dict[str, tuple[int, int]]:
    """Must-be-1 and may-be-1 of the controls whose values the sources give."""
    return {
        "pin": (0x16, 0x7F),
        "proc": (0x0400_6172, 0xFFF9_FFFE),
        "exit": (0x3_6DFB, 0x7F_FFFF if latest else 0x7F_EFFF),
        "entry": (0x11FB, 0xF3FF if latest else 0xD3FF),
    }


@dataclass
class Entry:
    """One VM entry that has no instruction: ``pending`` is KVM_STATE_NESTED_RUN_PENDING."""

    vmcs: Vmcs12
    vcpu: VcpuModel
    memory: MemoryModel
    caps: HostCaps
    evmcs: bool
    pending: bool

    def refused(self) -> bool:
        """Whether any check refuses."""
        return not all(check for part in (self._controls, self._events, self._host, self._guest) for check in part())

    @property
    def _latest(self) -> bool:
        return self.vcpu.world.latest

    def _page(self, name: str) -> bool:
        return self.vcpu.is_page(self.vmcs[name])

    def _within(self, name: str) -> bool:
        must, may = (0, self.caps.sec) if name == "sec" else must_may(self._latest)[name]
        if self.evmcs and not self._latest:
            may &= ~TAKEN.get(name, 0)
        value = self.vmcs[name]
        return value & must == must and not value & ~may

    def _controls(self) -> Iterator[bool]:
        v, latest, has2 = self.vmcs, self._latest, self.vmcs.has2
        pin, proc = v["pin"], v["proc"]
        yield from (self._within(name) for name in ("pin", "proc", "exit", "entry"))
        yield not proc >> 31 or self._within("sec")
        yield v["cr3_targets"] == 0
        yield not proc & 1 << 25 or (self._page("io_bitmap_a") and self._page("io_bitmap_b"))
        yield not proc & 1 << 28 or self._page("msr_bitmap")
        tpr_shadow, delivery = bool(proc & 1 << 21), has2(DELIVERY)
        yield not tpr_shadow or self._page("virtual_apic")
        yield not (tpr_shadow and latest and not delivery and v["tpr_threshold"] & ~0xF)
        yield not has2(APIC_ACCESS) or self._page("apic_access")
        posted = bool(pin & 0x80)
        if has2(X2APIC) or has2(REGISTERS) or delivery or posted:
            yield not (has2(X2APIC) and has2(APIC_ACCESS))
            yield not delivery or bool(pin & 1)
            yield not posted or self._posted(delivery)
            yield tpr_shadow
        yield not (pin & 0x20 and not pin & 8)
        yield not (proc & 1 << 22 and not pin & 0x20)
        yield not has2(PML) or (has2(EPT) and self._page("pml"))
        yield not (has2(UNRESTRICTED) or has2(MBEC)) or has2(EPT)
        yield not has2(SHADOWING) or (self._page("vmread_bitmap") and self._page("vmwrite_bitmap"))
        yield not has2(VPID) or v["vpid"] != 0
        yield not v["exit"] & 1 << 22 or bool(pin & 0x40)
        yield not has2(EPT) or self._eptp()
        yield not has2(VMFUNC) or self._vm_functions()
        yield not (latest and has2(TSC_SCALING) and v["tsc_multiplier"] == 0)
        yield from (self._list(name) for name in ("exit_load", "exit_store", "entry_load"))
        if latest and self.evmcs and self.vcpu.hyperv:
            yield from (not v[name] & ~mask for name, mask in EVMCS_MASKS.items())

    def _posted(self, delivery: bool) -> bool:
        v = self.vmcs
        described = v["posted_desc"]
        aligned = described % 64 == 0 and not described >> self.vcpu.width
        return delivery and bool(v["exit"] & 1 << 15) and not v["posted_nv"] >> 8 and aligned

    def _eptp(self) -> bool:
        eptp, caps = self.vmcs["eptp"], self.caps.ept
        kind, walk = eptp & 7, eptp >> 3 & 7
        if not ((kind == 6 and caps >> 14 & 1) or (kind == 0 and caps >> 8 & 1)):
            return False
        if walk != 3 and not (self._latest and walk == 4 and caps >> 7 & 1):
            return False
        if eptp >> self.vcpu.width or eptp >> 7 & 0x1F:
            return False
        return not eptp & 0x40 or bool(caps >> 21 & 1)

    def _vm_functions(self) -> bool:
        allowed = self.caps.vmfunc & ~(TAKEN["vmfunc"] if self.evmcs and not self._latest else 0)
        asked = self.vmcs["vmfunc"]
        if asked & ~allowed:
            return False
        return not asked & 1 or (self.vmcs.has2(EPT) and self._page("eptp_list"))

    def _list(self, name: str) -> bool:
        count, address = self.vmcs[f"{name}_count"], self.vmcs[f"{name}_addr"]
        if count == 0:
            return True
        if self._latest and count > 512 * ((self.caps.misc >> 25 & 7) + 1):
            return False
        return (
            address % 16 == 0 and not address >> self.vcpu.width and not (address + 16 * count - 1) >> self.vcpu.width
        )

    def _events(self) -> Iterator[bool]:
        v = self.vmcs
        info = v["event"]
        if not info >> 31:
            return
        kind, vector, coded = info >> 8 & 7, info & 0xFF, bool(info >> 11 & 1)
        protected = not v.has2(UNRESTRICTED) or bool(v["guest_cr0"] & PE)
        yield kind != 1
        yield kind != 2 or vector == 2
        yield kind != 3 or vector <= 31
        yield kind != 7 or vector == 0
        yield coded == (kind == 3 and protected and vector in WITH_ERROR_CODE)
        yield not coded or not v["event_error"] >> (16 if self._latest else 15)
        yield not info & 0x7FFF_F000
        if kind in {4, 5, 6}:
            zero_allowed = bool(self.caps.misc >> 30 & 1)
            yield v["event_length"] <= 15 and (v["event_length"] != 0 or zero_allowed)

    @staticmethod
    def _pat(value: int) -> bool:
        return all(value >> 8 * entry & 0xFF in MEMORY_TYPES for entry in range(8))

    def _canonical(self, *names: str) -> bool:
        """By 48 bits: no value that the model is asked about depends on LA57."""
        return all(self.vmcs[name] >> 47 in {0, (1 << 17) - 1} for name in names)

    def _cr4(self, value: int) -> bool:
        return self.vcpu.cr4_fits_vmx(value) and (not self._latest or self.vcpu.legal_cr4(value))

    @staticmethod
    def _efer(value: int, long_mode: bool, lme_matters: bool = True) -> bool:
        """The reference guest has long mode and execute-disable, and nothing else that EFER enables."""
        if value & ~(SCE | LME | LMA | NX) or bool(value & LMA) != long_mode:
            return False
        return not lme_matters or bool(value & LME) == long_mode

    def _host(self) -> Iterator[bool]:
        v, latest = self.vmcs, self._latest
        wide = bool(v["exit"] & 1 << 9)
        yield v["host_cr0"] & CR0_FIXED == CR0_FIXED and not v["host_cr0"] >> 32
        yield self._cr4(v["host_cr4"])
        yield not v["host_cr3"] >> self.vcpu.width
        yield self._canonical("host_sysenter_esp", "host_sysenter_eip")
        yield not v["exit"] & 1 << 19 or self._pat(v["host_pat"])
        yield all(not v[f"host_{name}"] & 7 for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr"))
        yield bool(v["host_cs"] and v["host_tr"] and (wide or v["host_ss"]))
        yield self._canonical(*(f"host_{name}_base" for name in ("fs", "gs", "gdtr", "idtr", "tr")))
        yield not v["exit"] & 1 << 21 or self._efer(v["host_efer"], wide)
        if latest:
            yield self._canonical("host_rip")
            if wide:
                yield bool(v["host_cr4"] & PAE)
            else:
                yield not v["entry"] & 1 << 9 and not v["host_cr4"] & PCIDE and not v["host_rip"] >> 32

    @property
    def guest_cr0_fixed(self) -> int:
        """What CR0 of L2 must have."""
        return CR0_FIXED & ~(PE | PG) if self.vmcs.has2(UNRESTRICTED) else CR0_FIXED

    def _guest(self) -> Iterator[bool]:
        v = self.vmcs
        cr0, wide = v["guest_cr0"], bool(v["entry"] & 1 << 9)
        yield cr0 & self.guest_cr0_fixed == self.guest_cr0_fixed and not cr0 >> 32
        yield self._cr4(v["guest_cr4"])
        yield not v["entry"] & 1 << 14 or self._pat(v["guest_pat"])
        yield v["link"] == NONE or self._link()
        if self._latest:
            yield cr0 & (PE | PG) != PG
            yield not wide or bool(v["guest_cr4"] & PAE and cr0 & PG)
        if self.pending and v["entry"] & 1 << 15:
            yield self._efer(v["guest_efer"], wide, lme_matters=bool(cr0 & PG))
        yield v["activity"] in ({0, 1, 3} if self._latest else {0, 1})

    def _link(self) -> bool:
        if not self._page("link"):
            return False
        raw = self.memory.load(self.vmcs["link"], 4)
        return raw is not None and int.from_bytes(raw, "little") == REVISION | self.vmcs.has2(SHADOWING) << 31
