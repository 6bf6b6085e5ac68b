"""One connection after its handshake, without a socket: bytes go in, what is to be sent and done comes out.

Messages are served in the order in which they arrive. A command that changes the machine is handed out and holds those
behind it until ``done``. A vCPU has one event open at a time; what it is asked besides waits behind it, and PAUSE comes
last. Commands are served while events stand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from service.kvmi import events
from service.kvmi.commands import COMMANDS, UNKNOWN
from service.kvmi.guest import RIP_AT, Change, Fault, Guest, RegisterLoad, Registers
from service.kvmi.wire import (
    CONTINUE,
    CRASH,
    EINVAL,
    EOPNOTSUPP,
    HEADER,
    V6,
    V7,
    VCPU_HEADER,
    Broken,
    Framer,
    Message,
    Refused,
    message,
    reply,
)

ALLOW, AGAIN, STOP, SKIP = "allow", "retry", "stop", "skip"
_LONGEST_INSTRUCTION = 15
CR3 = 3
# Events that were given up, whose late answers are passed over: as many as pauses of a vCPU may wait.
_EXPIRED = 1 << 10


class Send(NamedTuple):
    """A message to the tool, in one piece."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Do:
    """A change that the tool wants; ``done`` takes its outcome."""

    change: Change


@dataclass(frozen=True, slots=True)
class Answer:
    """What becomes of an access, or a load: allow, retry, stop or skip. ``token`` is that of what was asked about,
    ``value`` what is loaded."""

    token: Any
    action: str
    value: int | None = None


@dataclass(frozen=True, slots=True)
class Close:
    """The connection ends; what was sent before is still to arrive."""

    reason: str


Step = Send | Do | Answer | Close


@dataclass(slots=True, eq=False)
class _Event:
    """One that was sent, or waits for its turn. ``action`` is what a step that ends well comes to."""

    kind: int
    fault: Fault | None = None
    action: str = ALLOW
    seq: int = 0
    registers: Registers | None = None
    moved_rip: bool = False
    load: RegisterLoad | None = None

    @property
    def token(self) -> Any:
        """Of what is asked about; None for an event about nothing that waits."""
        about = self.fault or self.load
        return about.token if about is not None else None


@dataclass(slots=True)
class _Vcpu:
    """What the tool wants of one vCPU, and what it was asked."""

    enabled: set[int] = field(default_factory=set)
    registers: set[int] = field(default_factory=set)
    stepping: bool = False
    open: _Event | None = None
    waiting: deque[_Event] = field(default_factory=deque)
    pauses: int = 0


class Connection:
    """The hypervisor's end. ``step`` gives what is to be done next, until None."""

    def __init__(self, guest: Guest, dialect: str = V7) -> None:
        self.guest = guest
        self.dialect = dialect
        self.commands = 0
        self.events = 0
        # vCPUs whose loads of CR3 the tool wants to be asked about.
        self.loads: frozenset[int] = frozenset()
        self._framer = Framer()
        self._out: deque[Step] = deque()
        self._pending: Message | None = None
        self._closed = False
        self._replies = self._replies_next = True
        self._sequence = 0
        self._vcpus: dict[int, _Vcpu] = {}
        self._known_vcpus = guest.vcpus()
        self._of_vm: set[int] = set()
        self._expired: deque[tuple[int, int]] = deque(maxlen=_EXPIRED)
        self._boundless: list[tuple[int, int]] = []

    # In and out

    @property
    def buffered(self) -> int:
        """Bytes that have arrived and wait to be served."""
        return len(self._framer)

    def receive(self, data: bytes) -> None:
        """Bytes from the tool."""
        self._framer.feed(data)

    def at_once(self, data: bytes) -> bytes | None:
        """The reply to what has arrived, if that is one query of the machine, nothing is before it and it is answered
        well; None where it is to be received and served like all. What tools do most is to read page after page."""
        if self._framer or self._out or self._pending is not None or not self._replies or self._closed:
            return None
        if len(data) < HEADER.size:
            return None
        id, size, seq = HEADER.unpack_from(data)
        row = COMMANDS.get(id)
        if (
            row is None
            or row.handler is None
            or not row.queries
            or not size == row.layout.size == len(data) - HEADER.size
        ):
            return None
        try:
            found = row.handler(self, 0, row.layout.unpack_from(data, HEADER.size), b"")
        except Refused:
            return None
        assert isinstance(found, bytes)
        self.commands += 1
        self._replies = self._replies_next
        return reply(id, seq, 0, found)

    def step(self) -> Step | None:
        """What is to be done next; None while there is nothing, or a change is being made."""
        while not self._out and self._pending is None and not self._closed:
            try:
                found = self._framer.next()
                if found is None:
                    return None
                self._take(found)
            except Broken as broken:
                self._closed = True
                self._out.append(Close(str(broken)))
        return self._out.popleft() if self._out else None

    def done(self, errno: int) -> None:
        """The change that was handed out is made, or has failed with an error."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        self._reply(pending, errno)

    # Commands

    def _take(self, given: Message) -> None:
        if given.id == events.EVENT_REPLY:
            self._take_answer(given)
            return
        self.commands += 1
        row = COMMANDS.get(given.id)
        if row is None or row.handler is None:
            if not self._replies and self.dialect == V7:
                raise Broken(f"command {given.id} is not served, and replies are off")
            errno = UNKNOWN[self.dialect] if row is None else EOPNOTSUPP
            self._out.append(Send(reply(given.id, given.seq, errno)))
            return
        if row.replies and not self._replies:
            raise Broken(f"{row.name} answers with data, and replies are off")
        try:
            vcpu, body = self._vcpu_of(given) if row.of_vcpu else (0, given.payload)
            size = row.layout.size
            if len(body) < size or (len(body) > size and not row.tail):
                raise Refused(EINVAL)
            found = row.handler(self, vcpu, row.layout.unpack_from(body), body[size:])
        except Refused as refused:
            self._reply(given, refused.errno)
            return
        if isinstance(found, bytes):
            self._reply(given, 0, found)
        else:
            self._pending = given
            self._out.append(Do(found))

    def _vcpu_of(self, given: Message) -> tuple[int, bytes]:
        """The vCPU that a command is for, and what follows that."""
        if len(given.payload) < VCPU_HEADER.size:
            raise Refused(EINVAL)
        vcpu, pad, more = VCPU_HEADER.unpack_from(given.payload)
        if pad or more:
            if given.id == 7:
                raise Refused(EINVAL)
            raise Broken("padding of the vCPU's header is set")
        if vcpu >= self.guest.vcpus():
            raise Refused(EINVAL)
        return vcpu, given.payload[VCPU_HEADER.size :]

    def _reply(self, given: Message, errno: int, data: bytes = b"") -> None:
        if self._replies:
            self._out.append(Send(reply(given.id, given.seq, errno, data)))
        self._replies = self._replies_next

    # What handlers ask of the connection: see commands.Connection

    def knows_event(self, event: int) -> bool:
        return event in events.EVENTS and self.dialect in events.EVENTS[event].dialects

    def switch_replies(self, on: bool, *, now: bool) -> None:
        self._replies_next = on
        if now:
            self._replies = on

    def switch_vm_event(self, event: int, on: bool) -> None:
        (self._of_vm.add if on else self._of_vm.discard)(event)

    def switch_event(self, vcpu: int, event: int, on: bool) -> None:
        enabled = self._vcpu(vcpu).enabled
        (enabled.add if on else enabled.discard)(event)
        if event == events.CR:
            self._look_for_loads()

    def switch_register(self, vcpu: int, register: int, on: bool) -> None:
        registers = self._vcpu(vcpu).registers
        (registers.add if on else registers.discard)(register)
        self._look_for_loads()

    def _look_for_loads(self) -> None:
        watched = (i for i, vcpu in self._vcpus.items() if events.CR in vcpu.enabled and CR3 in vcpu.registers)
        self.loads = frozenset(watched)

    def switch_stepping(self, vcpu: int, on: bool) -> None:
        self._vcpu(vcpu).stepping = on

    def pauses(self, vcpu: int) -> int:
        return self._vcpu(vcpu).pauses

    def pause(self, vcpu: int) -> None:
        self._vcpu(vcpu).pauses += 1
        self._pump(vcpu)

    def rested(self) -> None:
        """The guest has come to rest: what was to be paused is."""
        for vcpu in self._vcpus:
            self._pump(vcpu)

    def set_registers(self, vcpu: int, regs: bytes) -> None:
        """Registers for when the open event of a vCPU is answered. All that can be set is RIP, behind its instruction.

        Raises Refused.
        """
        event = self._vcpu(vcpu).open
        if event is None:
            if self.dialect == V6:
                return
            raise Refused(EOPNOTSUPP)
        assert event.registers is not None
        shown = event.registers.regs
        if len(regs) != len(shown):
            raise Refused(EINVAL)
        moved = int.from_bytes(regs[RIP_AT : RIP_AT + 8], "little") - int.from_bytes(
            shown[RIP_AT : RIP_AT + 8], "little"
        )
        same = regs[:RIP_AT] == shown[:RIP_AT] and regs[RIP_AT + 8 :] == shown[RIP_AT + 8 :]
        longest = (event.fault.insn_len if event.fault is not None else 0) or _LONGEST_INSTRUCTION
        if not same or not 0 <= moved <= longest or (moved and event.kind != events.PF):
            raise Refused(EOPNOTSUPP)
        event.moved_rip = bool(moved)

    # Events

    def wants(self, event: int, vcpu: int | None = None) -> bool:
        """Whether the tool has enabled an event, of the machine or of a vCPU."""
        if vcpu is None:
            return event in self._of_vm
        known = self._vcpus.get(vcpu)
        return known is not None and event in known.enabled

    @property
    def watching(self) -> bool:
        """Whether PF is enabled on any vCPU."""
        return any(events.PF in vcpu.enabled for vcpu in self._vcpus.values())

    @property
    def paused(self) -> bool:
        """Whether a vCPU is paused, or will be as soon as its open event is answered."""
        for vcpu in self._vcpus.values():
            if vcpu.pauses or (vcpu.open is not None and vcpu.open.kind == events.PAUSE_VCPU):
                return True
        return False

    def vcpus_came(self) -> None:
        """Tell a tool that wants to know of vCPUs that are new."""
        known, self._known_vcpus = self._known_vcpus, self.guest.vcpus()
        if events.CREATE_VCPU not in self._of_vm:
            return
        for index in range(known, self._known_vcpus):
            self._vcpu(index).waiting.append(_Event(events.CREATE_VCPU))
            self._pump(index)

    def ask(self, fault: Fault) -> None:
        """Ask the tool about an access."""
        self._vcpu(fault.vcpu).waiting.append(_Event(events.PF, fault))
        self._pump(fault.vcpu)

    def ask_about(self, load: RegisterLoad) -> None:
        """Ask the tool about a load."""
        self._vcpu(load.vcpu).waiting.append(_Event(events.CR, load=load))
        self._pump(load.vcpu)

    def withdraw(self, token: Any) -> None:
        """What was asked about waits no more: its event is no longer open, and a late answer is passed over."""
        for index, vcpu in self._vcpus.items():
            vcpu.waiting = deque(event for event in vcpu.waiting if event.token is not token)
            if vcpu.open is not None and vcpu.open.token is token:
                self.give_up(index, vcpu.open.seq)

    def boundless(self) -> list[tuple[int, int]]:
        """vCPU and number of the events sent since this was asked last that are about no access, which alone has an
        end: whoever has a clock gives them up."""
        found, self._boundless = self._boundless, []
        return found

    def give_up(self, index: int, seq: int) -> None:
        """An event has stood too long: it is as good as answered by CONTINUE, and a late answer is passed over."""
        vcpu = self._vcpu(index)
        if vcpu.open is not None and vcpu.open.seq == seq:
            self._expired.append((index, seq))
            vcpu.open = None
            self._pump(index)

    def unhook(self) -> bool:
        """Ask the tool to go, if it wants to be asked; False if not."""
        if events.UNHOOK not in self._of_vm:
            return False
        self._send_event(events.unhook_part())
        return True

    def asked(self) -> list[Any]:
        """The tokens of all accesses and loads that the tool has not answered."""
        known: Iterable[_Event] = (
            event for vcpu in self._vcpus.values() for event in (vcpu.open, *vcpu.waiting) if event is not None
        )
        return [event.token for event in known if event.token is not None]

    def _vcpu(self, index: int) -> _Vcpu:
        return self._vcpus.setdefault(index, _Vcpu())

    def _send_event(self, payload: bytes) -> int:
        self._sequence = self._sequence + 1 & 0xFFFF_FFFF
        self.events += 1
        self._out.append(Send(message(events.EVENT, self._sequence, payload)))
        return self._sequence

    def _pump(self, index: int) -> None:
        """Send the next event of a vCPU that has none open."""
        vcpu = self._vcpu(index)
        if vcpu.open is not None:
            return
        if vcpu.waiting:
            self._open(index, vcpu.waiting.popleft())
        elif vcpu.pauses and self.guest.resting():
            vcpu.pauses -= 1
            self._open(index, _Event(events.PAUSE_VCPU))

    def _open(self, index: int, event: _Event) -> None:
        fault, own = event.fault, b""
        event.registers = self.guest.shown(index).at(fault.rip if fault is not None else None)
        if event.kind == events.PF:
            assert fault is not None
            own = events.pf_part(fault.gva, fault.gpa, fault.access)
        elif event.load is not None:
            own = events.cr_part(event.load.register, event.load.old, event.load.new)
        elif event.kind == events.SINGLESTEP:
            own = events.singlestep_part(self.dialect)
        event.seq = self._send_event(events.common_part(index, event.kind, event.registers) + own)
        self._vcpus[index].open = event
        if event.token is None:
            self._boundless.append((index, event.seq))

    # Answers

    def _take_answer(self, given: Message) -> None:
        if len(given.payload) < VCPU_HEADER.size:
            raise Broken("an answer to an event has no vCPU")
        index, pad, more = VCPU_HEADER.unpack_from(given.payload)
        if pad or more:
            raise Broken("padding of the vCPU's header is set")
        if index >= self.guest.vcpus():
            self._out.append(Send(reply(events.EVENT_REPLY, given.seq, EINVAL)))
            return
        vcpu = self._vcpu(index)
        event = vcpu.open
        if event is None or given.seq != event.seq:
            if (index, given.seq) in self._expired:
                self._expired.remove((index, given.seq))
                return
            if event is None:
                return
            raise Broken(f"an answer to event {given.seq} of vCPU {index}, which waits for that to {event.seq}")
        action, stepped = self._parsed(given, event)
        vcpu.open = None
        if event.load is not None:
            [value] = events.CR_ANSWER.unpack(given.payload[events.ANSWER.size :].ljust(events.CR_ANSWER.size, b"\0"))
            self._conclude_load(event.load, action, value)
        else:
            self._conclude(index, vcpu, event, action, stepped)
        self._pump(index)

    def _parsed(self, given: Message, event: _Event) -> tuple[int, bool]:
        """The action, and whether v6's flag asks for a step."""
        size, start = len(given.payload), events.ANSWER.size
        if not start <= size <= start + events.EVENTS[event.kind].answer_size:
            raise Broken(f"an answer of {size} bytes to {events.EVENTS[event.kind].name}")
        *_, action, _, pad = events.ANSWER.unpack_from(given.payload)
        if pad != bytes(6):
            raise Broken("padding of an answer to an event is set")
        if event.kind != events.PF:
            return action, False
        own = given.payload[start:].ljust(events.PF_ANSWER.size, b"\0")
        _, size, step, _, more, _ = events.PF_ANSWER.unpack(own)
        if size > events.MOST_CONTEXT or more or (step and self.dialect == V7):
            raise Broken("the answer to PF has more context than there may be, or its padding is set")
        return action, bool(step)

    def _conclude(self, index: int, vcpu: _Vcpu, event: _Event, action: int, stepped: bool) -> None:
        """What an answer comes to. What is no action counts as RETRY for PF and as CONTINUE for the others."""
        fault = event.fault
        if fault is None:
            return
        if action == CRASH:
            self._out.append(Answer(fault.token, STOP))
        elif event.kind == events.SINGLESTEP:
            self._out.append(Answer(fault.token, event.action))
        elif action != CONTINUE and event.moved_rip:
            self._out.append(Answer(fault.token, SKIP))
        elif action == CONTINUE or stepped or (self._steps(vcpu) and self._opened(fault)):
            if stepped or self._steps(vcpu):
                # The access lands once, whatever the tool restricts until it answers.
                vcpu.waiting.appendleft(_Event(events.SINGLESTEP, fault, ALLOW))
            else:
                self._out.append(Answer(fault.token, ALLOW))
        else:
            self._out.append(Answer(fault.token, AGAIN))

    def _conclude_load(self, load: RegisterLoad, action: int, value: int) -> None:
        """What an answer to CR comes to: without a value it means 0, and what is no action of it refuses the load."""
        if action == CONTINUE:
            self._out.append(Answer(load.token, ALLOW, value))
        else:
            self._out.append(Answer(load.token, STOP if action == CRASH else SKIP))

    def _steps(self, vcpu: _Vcpu) -> bool:
        return vcpu.stepping and events.SINGLESTEP in vcpu.enabled

    def _opened(self, fault: Fault) -> bool:
        """Whether the tool has opened the page for an access since it was asked."""
        gfn = fault.gpa >> 12
        return not self.guest.has_memory(gfn) or not fault.refused_by(self.guest.page(gfn))


__all__ = ["Answer", "Close", "Connection", "Do", "Send", "Step"]
