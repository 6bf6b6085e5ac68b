"""An attachment: a machine that looks for its tool at a socket, again and again, until it is told to stop.

It is a tool of the machine's broker all that time, and asked while one is connected. What the tool has restricted is
given back when its connection ends, and what it has not answered by then lands, as in the kernel.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import NAMESPACE_URL, UUID, uuid5

from engine.errors import Conflict, EngineError, InvalidValue, NotFound
from engine.kvm.resolutions import VIOLATION
from engine.trace.interactive import Load
from service.kvmi import events
from service.kvmi.connection import ALLOW, CR3, Connection
from service.kvmi.guest import Change, Fault, RegisterLoad
from service.kvmi.handshake import Identity
from service.kvmi.link import Link, Owner
from service.kvmi.machine import MachineGuest, described
from service.kvmi.wire import NO_ADDRESS, V6, V7
from service.platform.sockets import Address, NotAllowed, connected
from service.problems import ServiceError
from service.runtime.broker import PASS, Interest, Question, Resolution, Tool
from service.runtime.entry import Entry
from service.security.access import AccessControl, Principal
from service.security.audit import AuditLog
from service.settings import Settings

logger = logging.getLogger("subpage")

CONNECTING, HANDSHAKE, CONNECTED, ENDING = "connecting", "handshake", "connected", "ending"

_CONNECT_SECONDS = 2.0
# How long a tool that wants to be told has to go by itself, and what it is waited for when the service stops.
UNHOOK_SECONDS = 5.0
STOP_SECONDS = 1.0
# EPT violation: the linear address is valid, and the access was to it, not to a paging structure on the way.
_LINEAR, _TO_IT = 1 << 7, 1 << 8


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an attachment is to be. ``uuid`` and ``name`` of None are those of the machine."""

    connect: str
    address: Address
    dialect: str = V7
    cookie: bytes | None = None
    reconnect: float = 0.5
    uuid: UUID | None = None
    name: str | None = None
    priority: int = 0
    timeout: float | None = None


def uuid_of(entry: Entry) -> UUID:
    """The UUID of a machine that was given none: the same every time."""
    return uuid5(NAMESPACE_URL, f"subpage:{entry.id}")


class Attachment(Tool, Owner):
    """One machine's. ``start`` it; it ends with ``end``, with the machine, or with the right to have it."""

    def __init__(
        self,
        entry: Entry,
        wanted: Wanted,
        principal: Principal,
        access: AccessControl,
        audit: AuditLog,
        settings: Settings,
    ) -> None:
        self.id = f"tool_{secrets.token_hex(8)}"
        self.wanted = wanted
        self.priority = wanted.priority
        self.interest = Interest()
        self.timeout = wanted.timeout or settings.ask_timeout
        self.default_action: str | None = None
        self.identity = Identity(
            wanted.uuid or uuid_of(entry),
            entry.machine.config.name or entry.id if wanted.name is None else wanted.name,
            int(entry.created.timestamp()),
            wanted.cookie,
        )
        self.guest = MachineGuest(entry)
        self.state = CONNECTING
        self.attempts = 0
        self.connected_at: datetime | None = None
        self.last_error: str | None = None
        self._counts = (0, 0)
        self._loop = asyncio.get_running_loop()
        self._entry = entry
        self._principal = principal
        self._access = access
        self._audit = audit
        self._places = settings.kvmi_sockets
        self._link: Link | None = None
        # What it has last looked at whether it wants to be asked.
        self._seen: Fault | None = None
        self._paused = False
        self._withdrawn = False
        self._hold_limit: asyncio.TimerHandle | None = None
        # When the event that is open is given up, by the vCPU's index; of those about no access.
        self._limits: dict[int, asyncio.TimerHandle] = {}
        self._loads: frozenset[int] = frozenset()
        self._resting: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._seconds = UNHOOK_SECONDS
        self._task: asyncio.Task[None] | None = None
        self._until_end = contextlib.ExitStack()

    def start(self, most: int) -> asyncio.Task[None]:
        """Begin to look for the tool; done when it has ended.

        Raises LimitExceeded where ``most`` tools are attached to the machine.
        """
        self._entry.broker.connect(self, most)
        self._entry.broker.attach(self)
        self._entry.uses += 1
        self._until_end.enter_context(self._access.watching(self._principal, self.expel))
        self._task = self._loop.create_task(self._run())
        return self._task

    # The life of it

    async def _run(self) -> None:
        try:
            while self._ending is None:
                self.state = CONNECTING
                try:
                    await self._once()
                except (NotAllowed, OSError, EngineError, ServiceError) as error:
                    self._failed(str(error))
                await self._restore()
                if self._ending is None:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self.wanted.reconnect):
                            await self._wake.wait()
        except Exception:
            logger.exception("the attachment of %s has failed", self._entry.id)
            self.begin_end()
            await self._restore()

    async def _once(self) -> None:
        """One connection, from its beginning to its end."""
        self.attempts += 1
        tenant = self._entry.tenant
        made = await asyncio.to_thread(connected, self.wanted.address, self._places, tenant, _CONNECT_SECONDS)
        if self._ending is not None:
            made.close()
            return
        self.state = HANDSHAKE
        try:
            link = self._link = Link(self, self.identity, Connection(self.guest, self.wanted.dialect))
        except BaseException:  # the machine cannot be read just now
            made.close()
            raise
        loop = self._loop
        try:
            open_link = loop.create_connection if self.wanted.address.path is None else loop.create_unix_connection
            try:
                await open_link(lambda: link, sock=made)
            except BaseException:
                made.close()  # a tool may have left by now
                raise
            if self._ending is not None:
                link.close("the attachment has ended")
            reason = await link.over
            made.detach()  # the loop had its descriptor, and has closed it
        finally:
            self._counts = self._counted()
            self._link = None
            self._loads = frozenset()
            self._watch(self._loads)
            for limit in self._limits.values():
                limit.cancel()
            self._limits.clear()
            self._release()
        if link.hooked:
            self._tell("disconnected", reason=reason)
        if self._ending is None:
            self.state = CONNECTING
        self.connected_at = None
        self._failed(reason)
        # The tool's restrictions still stand; whatever they refuse until they are lifted lands, too.
        for question in link.connection.asked():
            self.answered(question, ALLOW)
        await link.settled()

    async def _restore(self) -> None:
        """Lift what a tool has left. What cannot be now is tried again before the next connection."""
        try:
            await self.guest.give_back()
        except (EngineError, ServiceError) as error:
            self._failed(f"restrictions of the tool cannot be lifted yet: {error}")

    def _failed(self, reason: str) -> None:
        self.last_error = reason

    def _tell(self, change: str, **members: str) -> None:
        """Of the life of it, in the logs."""
        logger.info("kvmi of %s: %s %s", self._entry.id, change, " ".join(members.values()))
        self._audit.write(
            "kvmi",
            self._principal,
            vm=self._entry.id,
            tool=self.id,
            change=change,
            connect=self.wanted.connect,
            **members,
        )

    @property
    def connected(self) -> bool:
        """Whether a tool has the machine, or is being asked whether it takes it."""
        return self._link is not None

    def begin_end(self, seconds: float = UNHOOK_SECONDS) -> asyncio.Task[None]:
        """Have it end: a tool that wants to be told has ``seconds`` to go by itself."""
        self._seconds = min(self._seconds, seconds)
        if self._ending is None:
            self._ending = self._loop.create_task(self._end())
        return self._ending

    async def _end(self) -> None:
        self.state = ENDING
        self._wake.set()
        link = self._link
        if link is not None:
            if link.hooked and link.connection.unhook():
                link.turn()
                await asyncio.wait([link.over], timeout=self._seconds)
            link.close("the attachment has ended")
        assert self._task is not None
        await asyncio.wait([self._task])
        self._entry.broker.leave(self)
        self._entry.uses -= 1
        self._until_end.close()
        self._tell("detached")

    def withdraw(self) -> None:
        """Be asked no more, and hold nothing; what was asked goes to the next."""
        self._withdrawn = True
        self._release()
        self._entry.broker.detach(self)

    # As a tool of the broker

    @property
    def entitled(self) -> bool:
        if self._access.holds(self._principal):
            return True
        self.expel()
        return False

    def expel(self) -> None:
        """The token is not valid any more."""
        self._failed("the token is not valid any more")
        self.begin_end()

    def dismiss(self, why: Exception) -> None:
        self._failed(str(why))
        self.begin_end()

    def wants(self, question: Question) -> bool:
        """What this tool's restrictions refuse, where it wants to hear of it; as the kernel asks no other. And loads of
        CR3, which v6 tells of only where they change it."""
        if question.load is not None:
            if self._link is None or question.load.vcpu not in self.watched:
                return False
            return self.wanted.dialect != V6 or self._load(question, question.load).old != question.load.operand
        exit = question.exit
        page = self.guest.restricted.get(int(exit.column("gfn")[0]))
        if page is None or int(exit.column("resolution")[0]) != VIOLATION:
            return False
        if _on_the_way(int(exit.column("qualification")[0])):
            return False
        fault = self._seen = self._fault(question)
        if not fault.refused_by(page):
            return False
        return self._link is None or self._link.connection.wants(events.PF, fault.vcpu)

    def ask(self, question: Question) -> None:
        if self._link is None:
            self.answered(question, ALLOW)
            return
        if question.load is not None:
            self._link.connection.ask_about(self._load(question, question.load))
            self._link.turn()
            return
        seen = self._seen
        self._link.connection.ask(seen if seen is not None and seen.token is question else self._fault(question))
        self._link.turn()

    def tell(self, question: Question, resolution: Resolution) -> None:
        if self._link is not None and resolution.by != self.id:
            self._link.connection.withdraw(question)
            self._link.turn()

    def vcpus_came(self) -> None:
        if self._link is not None:
            self._link.connection.vcpus_came()
            self._link.turn()

    def _fault(self, question: Question) -> Fault:
        exit = question.exit
        gpa = int(exit.column("gpa")[0])
        end = int(exit.record_gpa[0]) + int(exit.column("size")[0])
        pc = int(exit.carry["pc"][0]) if "pc" in exit.carry else 0
        return Fault(
            self.guest.index_of(int(exit.column("vcpu")[0])),
            gpa,
            min(end, (gpa | 0xFFF) + 1) - gpa,
            1 << int(exit.column("access")[0]),
            int(exit.column("gva")[0]) if exit.has_gva else NO_ADDRESS,
            pc or None,
            int(exit.column("insn_len")[0]),
            token=question,
        )

    def _load(self, question: Question, load: Load) -> RegisterLoad:
        index = self.guest.index_of(load.vcpu)
        return RegisterLoad(index, CR3, self.guest.shown(index).cr3, load.operand, question)

    def _watch(self, vcpus: frozenset[int]) -> None:
        if vcpus != self.watched:
            self.watched = vcpus
            self._entry.broker.watch()

    # As the owner of a link

    def hooked(self) -> None:
        self.state = CONNECTED
        self.connected_at = datetime.now(UTC)
        self.last_error = None
        self._tell("connected")

    async def make(self, change: Change) -> int:
        if not self._access.holds(self._principal):
            self.expel()
            return 1
        errno = await self.guest.make(change)
        self._audit.write(
            "kvmi", self._principal, vm=self._entry.id, tool=self.id, change="command", **described(change), error=errno
        )
        return errno

    def answered(self, token: Question, action: str, value: int | None = None) -> None:
        token.value = value
        try:
            self._entry.broker.answer(self, token.id, action)
        except InvalidValue:  # a store of a guest that runs cannot be skipped: another tool, or the default, decides
            self._entry.broker.answer(self, token.id, PASS)
            action = PASS
        except (NotFound, Conflict):
            return  # it has waited too long, or what asked has ended
        self._audit.write("answer", self._principal, vm=self._entry.id, tool=self.id, question=token.id, action=action)

    def served(self) -> None:
        link = self._link
        if link is None:
            return
        for index, seq in link.connection.boundless():
            if (before := self._limits.get(index)) is not None:
                before.cancel()
            self._limits[index] = self._loop.call_later(self.timeout, self._give_up, link, index, seq)
        if link.connection.loads is not self._loads:
            self._loads = link.connection.loads
            self._watch(self.guest.ids_of(self._loads))
        paused = link.connection.paused and not self._withdrawn
        if paused and not self._paused:
            self._paused = True
            self._entry.broker.hold(self)
            # The guest does not wait for ever for a tool that has forgotten it.
            self._hold_limit = self._loop.call_later(self.timeout, self._entry.broker.release, self)
        elif self._paused and not paused:
            self._release()
        if paused and self._entry.lock.held and self._resting is None:
            self._resting = self._loop.create_task(self._rest(link))

    def _give_up(self, link: Link, index: int, seq: int) -> None:
        """An event that is about no access does not stand for ever, either."""
        if self._link is link:
            link.connection.give_up(index, seq)
            link.turn()

    def _release(self) -> None:
        self._paused = False
        self._entry.broker.release(self)
        if self._hold_limit is not None:
            self._hold_limit.cancel()

    async def _rest(self, link: Link) -> None:
        """Tell the connection when what holds the machine has let go of it."""
        try:
            async with self._entry.lock.hold(patient=True):
                pass
        finally:
            self._resting = None
        if self._link is link:
            link.connection.rested()
            link.turn()

    # What it tells of itself

    def _counted(self) -> tuple[int, int]:
        """Commands of the tool that is connected or was last, and events that were sent to it."""
        if self._link is None:
            return self._counts
        return self._link.connection.commands, self._link.connection.events

    @property
    def commands(self) -> int:
        return self._counted()[0]

    @property
    def events(self) -> int:
        return self._counted()[1]

    @property
    def silence(self) -> str | None:
        """Why no PF can come, None where one can."""
        if self._link is None or not self._link.hooked:
            return "no tool is connected"
        if not self._link.connection.watching:
            return "the tool has enabled PF on no vCPU"
        if not self.guest.restricted:
            return "the tool has restricted no page"
        return None


def _on_the_way(qualification: int) -> bool:
    """Whether a processor met it on its way through the guest's page tables: of those KVM asks no tool."""
    return bool(qualification & _LINEAR) and not qualification & _TO_IT


class Attachments:
    """Those of all machines, by the machine's id; used from the event loop only."""

    def __init__(self, settings: Settings, access: AccessControl, audit: AuditLog) -> None:
        self._settings = settings
        self._access = access
        self._audit = audit
        self._known: dict[str, Attachment] = {}

    def find(self, entry: Entry) -> Attachment | None:
        """That of a machine."""
        return self._known.get(entry.id)

    async def put(self, entry: Entry, wanted: Wanted, principal: Principal) -> tuple[Attachment, bool]:
        """Attach a machine, in place of an attachment that no tool has; whether it is the first.

        Raises Conflict where a tool is connected, LimitExceeded.
        """
        made = Attachment(entry, wanted, principal, self._access, self._audit, self._settings)
        before = self._known.get(entry.id)
        if before is not None:
            if before.connected:
                rule = "a tool is connected, and a machine has one: delete the attachment first"
                raise Conflict(rule, field="kvmi", value=before.state, errno="EEXIST")
            await asyncio.wait([before.begin_end()])
        if self._known.get(entry.id) is not None:
            raise Conflict("another request attaches the machine", field="kvmi", value=CONNECTING, errno="EEXIST")
        made.start(self._settings.max_tools).add_done_callback(lambda _: self._forget(made))
        self._known[entry.id] = made
        return made, before is None

    def _forget(self, gone: Attachment) -> None:
        for vm in [vm for vm, known in self._known.items() if known is gone]:
            del self._known[vm]

    def drain(self) -> None:
        """The service stops: what was asked is asked no more, and ends as with every tool that leaves then."""
        for known in self._known.values():
            known.withdraw()

    async def stop(self) -> None:
        """End all of them, in little time."""
        ending = [known.begin_end(STOP_SECONDS) for known in list(self._known.values())]
        if ending:
            await asyncio.wait(ending)
