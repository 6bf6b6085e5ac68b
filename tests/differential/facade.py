"""A machine of the engine, asked through its binary ABI."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

from engine.abi import Call as AbiCall
from engine.abi import UserBuffer, UserMemory
from engine.arch.access import READ
from engine.errors import EngineError
from engine.ioctls import IOCTLS, Target, as_created
from engine.machine import VirtualMachine
from engine.state.config import HostConfig, VmConfig
from engine.trace.single import AccessRequest
from tests.differential.calls import WIDTH, Answer, Call, World

_HYPERV: dict[str, dict[str, Any] | None] = {
    "": None,
    "direct": {},
    "plain": {"cpuid": [{"function": 0x4000_000A, "eax": 0x8_0101}]},
    "full": {"fail_allocation": True},
}


@cache
def _made(world: World) -> VirtualMachine:
    """A machine with one vCPU, made as KVM_CREATE_VM and KVM_CREATE_VCPU make them; it is only copied."""
    host = HostConfig(
        vendor=world.vendor,
        ept=world.ept,
        spp=world.spp,
        nested=world.nested,
        hyperv=_HYPERV[world.hyperv],
        fail_allocation=world.fail_allocation,
    )
    config = VmConfig(profile=world.profile, vcpus=(), vcpu_room=1, maxphyaddr=WIDTH, host=host)
    machine = VirtualMachine.create(config, [], spp=False)
    as_created(machine)
    for name in ("KVM_CREATE_IRQCHIP",) * world.irqchip + ("KVM_CREATE_VCPU",):
        reply = IOCTLS.perform(Target(world.profile, host, machine), AbiCall(name, "vm"))
        assert reply.errno is None, (name, reply)
    return machine


class Facade:
    """One machine with one vCPU."""

    def __init__(self, world: World) -> None:
        made = _made(world)
        self.machine = VirtualMachine(made.state.twin())
        self.target = Target(world.profile, made.config.host, self.machine, 0)

    def answer(self, call: Call) -> Answer:
        """Make the call."""
        if call.name == "TOUCH":
            self.machine.access(AccessRequest(call.arg, access=READ))
            return Answer(0)
        if call.name == "POKE":
            with contextlib.suppress(EngineError):  # no slot: user space has no memory there
                self.machine.write_memory(call.arg, call.data or b"")
            return Answer(0, data=call.data)
        user = UserBuffer.of(call.data, call.read_only)
        memory = UserMemory([(call.segment[0], bytearray(call.segment[1]))] if call.segment else [])
        reply = IOCTLS.perform(self.target, AbiCall(call.name, call.level, user, call.arg, memory))
        left = bytes(memory.segments[0][1]) if memory.segments else None
        return Answer(reply.returns, reply.errno, None if user.data is None else bytes(user.data), left)
