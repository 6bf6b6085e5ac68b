"""The machine of the printed vectors: five VPs whose caches hold the same eight translations, A to H."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from engine.arch import access as acc
from engine.arch import controls as ctl
from engine.arch import hyperv_cpuid as leaves
from engine.arch.paging import LINEAR_48
from engine.arch.words import signed
from engine.cpu import frames, tlb
from engine.hyperv import dispatch, queues
from engine.hyperv.caller import Caller
from engine.hyperv.dispatch import HypercallContext
from engine.hyperv.flush_execution import Facts, Vp
from engine.hyperv.outcome import Outcome
from engine.hyperv.privileges import Privileges
from engine.hyperv.tlfs_rules import Environment
from engine.state.config import VcpuConfig, VmConfig
from engine.state.profiles import KVM_2019
from tests.engine.builders import bare_draft, new_trail
from tests.engine.ram import Ram

PAGE = 0x1000
VP_INDICES = (0, 1, 2, 3, 65)
INPUT = 0x5000

# name: address space, linear address, log2 of the page's size, global
ENTRIES = {
    "A": (0x1000, 0x00007F0000001000, 12, False),
    "B": (0x1000, 0x00007F0000002000, 12, False),
    "C": (0x1000, 0x00007F0000200000, 21, False),
    "D": (0x2000, 0x00007F0000001000, 12, False),
    "E": (0x1000, 0xFFFF800000001000, 12, True),
    "F": (0x2000, 0x00007F0040000000, 30, False),
    "G": (0x1000, 0x00007F0001000000, 21, False),
    "H": (0x2000, 0x00007F0080000000, 30, False),
}
ALL = "".join(ENTRIES)

PRIVILEGES = Privileges(
    hyperv=True,
    os_id=0x8100 << 48,
    features_edx=leaves.FEATURES_EDX_XMM_INPUT | leaves.FEATURES_EDX_EXTENDED_RANGES,
    recommendations=leaves.RECOMMEND_REMOTE_FLUSH | leaves.RECOMMEND_EX_PROCESSOR_MASKS,
    nested_eax=0xA0101,
)


class FlushMachine:
    """State S0 of the vectors on a host with linear addresses of ``width`` bits.

    ``call`` executes a hypercall of VP 0 on it.
    """

    def __init__(
        self,
        policy: str = "kvm",
        execution: str | None = None,
        *,
        profile: str = KVM_2019,
        width: int = LINEAR_48,
        **changes: Any,
    ) -> None:
        config = VmConfig(
            profile=profile,
            vcpus=tuple(VcpuConfig(i, vp_index) for i, vp_index in enumerate(VP_INDICES)),
            translation_cache="model",
            flush_policy=policy,
            flush_execution=execution,
        )
        self.draft = bare_draft(config)
        self.m = self.draft.machine
        self.ram = Ram((INPUT, INPUT + PAGE))
        self.vps = [Vp(position, position, vp_index) for position, vp_index in enumerate(VP_INDICES)]
        self.context = HypercallContext(
            machine=self.m,
            memory=self.ram,
            partition_memory=self.ram,
            privileges=PRIVILEGES,
            vps=self.vps,
            policy=policy,
            environment=Environment(width),
            facts=Facts.of(config, width),
        )
        self.context = replace(self.context, **changes)
        for vp in self.vps:
            for entry in ENTRIES.values():
                self.fill(vp.position, *entry)

    def fill(
        self, vcpu: int, space: int, linear: int, bits: int, is_global: bool, nested: tuple[int, int] | None = None
    ) -> None:
        """Put a translation into the cache of a vCPU, in a PCID of its address space."""
        frame = frames.FIRST_VCPU_FRAME + vcpu
        words = {
            ctl.V_CR3: space | space >> 12,
            ctl.V_CR4: 1 << 17,
            ctl.V_NESTED: signed(1 | nested[1] << 32) if nested else 0,
            ctl.V_NESTED_VM: signed(nested[0]) if nested else 0,
        }
        for word, value in words.items():
            frames.write_word(self.m, frame, word, value)
        facts = acc.LINEAR_VALID | bits << tlb.GUEST_SIZE_AT | (tlb.GUEST_GLOBAL if is_global else 0)
        tlb.remember(self.m, vcpu, tlb.COMBINED, signed(linear) >> 12, 1, facts, new_trail())
        for word in (ctl.V_NESTED, ctl.V_NESTED_VM):
            frames.write_word(self.m, frame, word, 0)

    def held(self, vcpu: int) -> str:
        """Names of the translations that a vCPU's own cache still has."""
        table = self.m.tlb
        live = (table[:, tlb.E_GENERATION] == table[0, tlb.GENERATION]) & (table[:, tlb.E_NESTED] == 0)
        rows = table[live & (table[:, tlb.E_KIND] >> tlb.VCPU_SHIFT == vcpu)][:, :]
        return names(row for row in rows if row[tlb.E_FRAME])

    def state(self) -> Any:
        """All that a call may change: what every VP's cache holds, and the queues."""
        return [self.held(vp.position) for vp in self.vps], self.m.queues.tobytes()

    def write(self, data: bytes, gpa: int = INPUT) -> None:
        self.ram.write(gpa, data)

    def call(self, caller: Caller) -> Outcome:
        return dispatch.hypercall(caller, self.context)

    def slow(self, control: int, data: bytes, gpa: int = INPUT) -> Outcome:
        """A hypercall with its block in memory."""
        self.write(data, gpa)
        return self.call(Caller(rcx=control, rdx=gpa))

    def run_elsewhere(self, *vp_indices: int) -> None:
        """Those VPs do not execute their guest now."""
        self.vps[:] = [replace(vp, running=vp.vp_index not in vp_indices) for vp in self.vps]

    def queue(self, vcpu: int, which: int = queues.OWN_QUEUE) -> tuple[int, ...]:
        return queues.contents(self.m.queues, vcpu, which)


def names(rows: Iterable[Any]) -> str:
    """The entries of ENTRIES that rows of the cache are."""
    by_place = {(space, signed(linear) >> 12): name for name, (space, linear, _, _) in ENTRIES.items()}
    return "".join(sorted(by_place[int(row[tlb.E_ADDRESS_SPACE]), int(row[tlb.E_PAGE])] for row in rows))


def words(*values: int) -> bytes:
    """Words of 8 bytes in memory order."""
    return b"".join((value % (1 << 64)).to_bytes(8, "little") for value in values)
