"""A machine: its memory, what is protected in it, replays and single accesses, events and introspection."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

from subpage.bitmaps import Bitmap, to_wire
from subpage.bodies import OCTETS, TEXT, Body, body_of
from subpage.errors import BadInput
from subpage.events import following
from subpage.handles import Handle, Member
from subpage.html import Document
from subpage.introspection import AsyncTool, Handler, Tool
from subpage.jobs import AsyncJob, Job, JobOperations
from subpage.modes import Awaiting, Blocking, operation, stream
from subpage.policies import policy_of
from subpage.progress import Progress, reporting
from subpage.traces import AsyncTrace, Trace, TraceOperations
from subpage.values import address, members_of
from subpage.wire import Reply

_OCTETS = {"Accept": OCTETS}

R = TypeVar("R", bound=TraceOperations)
J = TypeVar("J", bound=JobOperations[Any])


class VmOperations(Handle, Generic[R, J]):
    """One machine."""

    _names: ClassVar = {"vm": "id"}
    _trace: type[R]
    _job: type[J]
    name = Member(str, "Its label.")

    # The machine itself

    @operation()
    async def call(self, /, operation_id: str, *, path: Mapping[str, Any] | None = None, **options: Any) -> Reply:
        """As ``client.call``, with the machine in the path: ``vm.call("getTlb", path={"n": 0}).status`` is ``200``."""
        again = options.get("content") is None or isinstance(options["content"], bytes)
        return await self._call(operation_id, path=path, again=again, **options)

    @operation("cloneVm")
    async def clone(self, name: str | None = None) -> Self:
        """Another machine that is as this one is now, copied on write: to try a second policy beside the first.
        ``vm.clone("second").subpages(0x10) == vm.subpages(0x10)`` is ``True``."""
        return type(self)(self._core, await self._document("cloneVm", json=members_of(name=name)))

    @operation("getVm")
    async def refresh(self) -> Document:
        """Read it again: ``vm.refresh()["spp"]`` is ``True``."""
        self.document = await self._document("getVm")
        return self.document

    @operation("deleteVm")
    async def delete(self) -> None:
        """Delete it, and all that is kept of it: ``client.create_vm("another").delete()``."""
        await self._call("deleteVm")

    @operation("getCounters")
    async def counters(self) -> dict[str, int]:
        """Totals of exits, faults, flushes, memory: ``vm.counters()["exits_ept_violation"] >= 0`` is ``True``."""
        return dict((await self._document("getCounters"))["counters"])

    @operation("putSpp")
    async def enable_spp(self) -> None:
        """Enable sub-page permissions; there is no way back: ``vm.enable_spp()``."""
        await self._call("putSpp", json={"active": True})

    # Memory

    @operation("listMemorySlots")
    async def slots(self) -> list[Document]:
        """Its memory slots: ``[slot["gpa"] for slot in vm.slots()]`` is ``['0x0']``."""
        return list(map(Document, (await self._document("listMemorySlots"))["memory_slots"]))

    @operation("putMemorySlot")
    async def set_slot(self, /, slot: int, gpa: int | str, size: int | str, **members: Any) -> Document:
        """Create, move, change one: ``vm.set_slot(1, 1 << 28, "1MiB", log_dirty=True)["size"]`` is ``'0x100000'``."""
        document = {"gpa": address(gpa), "size": address(size), **members}
        return await self._document("putMemorySlot", path={"slot": slot}, json=document)

    @operation("deleteMemorySlot")
    async def delete_slot(self, slot: int) -> None:
        """Take a slot away: ``vm.delete_slot(1)``."""
        await self._call("deleteMemorySlot", path={"slot": slot})

    @operation("writeMemory")
    async def write_memory(self, gpa: int | str, data: Any) -> None:
        """Write as the host does: no permission of the guest is asked. ``vm.write_memory(0x3000, b"subpage")``."""
        query, headers = {"gpa": address(gpa)}, {"Content-Type": OCTETS}
        await self._call("writeMemory", query=query, content=bytes(data), headers=headers)

    @operation("readMemory")
    async def read_memory(self, gpa: int | str, size: int) -> bytes:
        """Bytes of its RAM, as the host sees them: ``vm.read_memory(0x3000, 7)`` is ``b'subpage'``."""
        query = {"gpa": address(gpa), "size": size}
        return (await self._call("readMemory", query=query, headers=_OCTETS)).content

    @operation("writeMemory")
    async def load_image(
        self, source: Any, *, format: str = "auto", gpa: int | str | None = None, progress: Progress = False
    ) -> Document:
        """Load a memory image: a raw one, an ELF core, LiME; from a path, bytes or an iterator.
        ``vm.load_image(b"bytes" * 100, format="raw", gpa=0x4000)["format"]`` is ``'raw'``."""
        body = await self._core.transport.away(body_of, source, OCTETS)
        reply = await self._send("writeMemory", body, {"format": format, "gpa": address(gpa)}, progress)
        return Document(reply.json() or {})

    @operation("loadSymbols")
    async def load_symbols(self, /, source: Any, **options: Any) -> Document:
        """Load the names of the guest's kernel: kallsyms, System.map, ISF, an ELF image. ``options`` are ``format``,
        ``slide``, ``phys_base``. ``vm.load_symbols(b"ff2a5c6a0 D modprobe_path\\n", slide=0)["symbols"]`` is ``1``."""
        query = {name: address(value) if isinstance(value, int) else value for name, value in options.items()}
        body = await self._core.transport.away(body_of, source, OCTETS)
        return Document((await self._send("loadSymbols", body, query, False)).json())

    @operation("getSymbols")
    async def symbols(self, name: str | None = None, at: int | str | None = None) -> Document:
        """What is loaded, and the symbols of a name or around an address.
        ``vm.symbols("modprobe_path")["matches"][0]["name"]`` is ``'modprobe_path'``."""
        return await self._document("getSymbols", query={"name": name, "at": address(at)})

    # Protection

    @operation("createProtection")
    async def protect(
        self, policy: Any, *, name: str | None = None, pages: Sequence[Sequence[Any]] | None = None
    ) -> Document:
        """Protect what a policy names: a path, a document, or a list of objects with ``name``, ``gpa`` and ``size``.

        Raises Problem, with the field and the rule; BadInput for a file that is no policy. ::

        >>> found = vm.protect([{"name": "table", "gpa": 0x8000, "size": 256}], name="kernel")
        >>> found["subpages"], vm.subpages(8)[0]
        (2, 4294967292)
        """
        document = await self._core.transport.away(policy_of, policy, name, pages)
        return await self._document("createProtection", json=document)

    @stream("listProtections")
    def protections(self) -> AsyncGenerator[Document, None]:
        """What is protected, in order: ``[found["name"] for found in vm.protections()]`` is ``['kernel']``."""
        return self._core.pages("listProtections", "protections", path=self._place)

    @operation("deleteProtection")
    async def unprotect(self, name: str) -> None:
        """End a protection: ``vm.unprotect("kernel")``."""
        await self._call("deleteProtection", path={"name": name})

    @operation("getSubpages")
    async def subpages(self, gfn: int, npages: int = 1, *, layer: str | None = None) -> Bitmap:
        """The write bitmaps of pages; ``layer`` is ``effective`` (the default), ``set``, ``protected``, ``granted``. ::

        >>> print(vm.subpages(0x10))
        0x10  .###############################
        """
        query = {"gfn": gfn, "npages": npages, "layer": layer}
        reply = await self._call("getSubpages", query=query, headers=_OCTETS)
        return Bitmap(gfn, reply.content, reply.etag)

    @operation("putSubpages")
    async def set_subpages(self, gfn: int, access: Any, *, etag: str | None = None) -> None:
        """Set the write bitmaps of the pages from ``gfn`` on: a word, several, a Bitmap, or bytes as they are.

        With the ``etag`` of a Bitmap only where it is still so; Problem 412 otherwise. ::

        >>> vm.set_subpages(0x11, [0xFFFF0000, "0xffffffff"])
        >>> vm.subpages(0x11, 2)[0]
        4294901760
        """
        words = to_wire(access)
        headers = {"Content-Type": OCTETS} if etag is None else {"Content-Type": OCTETS, "If-Match": etag}
        query = {"gfn": gfn, "npages": len(words) // 4}
        await self._call("putSubpages", query=query, content=words, headers=headers)

    @operation("patchSubpages")
    async def patch_subpages(self, ranges: Iterable[Mapping[str, Any]]) -> None:
        """Set many places at once: ranges with ``gfn``, ``npages`` and ``access``, a word or a list.
        ``vm.patch_subpages([{"gfn": 0x20, "access": 0}, {"gfn": 0x40, "npages": 2, "access": "0xffffffff"}])``."""
        await self._call("patchSubpages", json={"ranges": [dict(item) for item in ranges]})

    @operation("getPageAccess")
    async def page_access(self, gfn: int, npages: int = 1) -> list[Document]:
        """Rights of whole pages, with their write bitmaps: ``vm.page_access(0x20)[0]["access"]`` is ``'r-x'``."""
        found = await self._document("getPageAccess", query={"gfn": gfn, "npages": npages})
        return list(map(Document, found["pages"]))

    @operation("patchPageAccess")
    async def set_page_access(self, entries: Iterable[Mapping[str, Any]], *, mode: str = "atomic") -> list[Document]:
        """Set rights of pages: entries with ``gfn``, ``access``, ``write_bitmap``; what became of each.
        ``vm.set_page_access([{"gfn": 0x21, "access": "r--"}])[0]["result"]`` is ``'applied'``."""
        document = {"mode": mode, "entries": [dict(entry) for entry in entries]}
        found = await self._document("patchPageAccess", json=document)
        return list(map(Document, found.get("results", [])))

    # Accesses

    @operation("executeAccess")
    async def access(
        self,
        /,
        gpa: int | str | None = None,
        size: int = 8,
        access: str = "write",
        *,
        on_violation: str = "skip",
        data: bytes | None = None,
        **members: Any,
    ) -> Document:
        """One access, executed. ``on_violation`` is ``skip``, ``allow``, ``grant`` or ``ask``.
        ``vm.access(0x10040)["exits"][-1]["denied"]`` is ``'0x1'``."""
        members |= {"gpa": address(gpa), "size": size, "access": access, "on_violation": on_violation}
        document, patience = members_of(data=data, **members), None if on_violation == "ask" else -1.0
        return await self._document("executeAccess", json=document, patience=patience)

    @operation("explainAccess")
    async def walk(self, /, gpa: int | str, access: str = "write", size: int = 8, **query: Any) -> Document:
        """Every EPT and SPPT entry that an access reads, and how it ends; changes nothing.
        ``vm.walk(0x10040)["then"]["resolution"]`` is ``'violation'``."""
        query = {"gpa": address(gpa), "access": access, "size": size, **query}
        return await self._document("explainAccess", query=query)

    @operation("createTrace", "getJob", "getTrace")
    async def replay(self, /, source: Any, *, media: str | None = None, progress: Progress = False, **query: Any) -> R:
        """Replay a trace: a path, bytes, an iterator of bytes or of records, a table of Arrow, an array of addresses.

        It is sent while it is read. ``query`` are the parameters of the call: ``on_violation``, ``start``, ``include``,
        ``carry``, ``format``, ``record``, ``columns``, ``max_exit_records`` and others. ``media`` is the media type
        where neither the name nor the first bytes tell. ``progress``: a line on standard error, or a function that is
        told the bytes sent and their number. Raises Problem with ``index`` for a record, BadInput, Unreachable: then
        nothing happened, unless the problem has ``resume_at``. ::

        >>> trace = vm.replay([{"gpa": 0x10040}, {"gpa": 0x10080, "size": 4}])
        >>> trace.violations, trace.page_granular_violations
        (1, 2)
        """
        reply = await self._replay(source, media, progress, query)
        if reply.status == 202:
            return cast(R, await JobOperations.wait(self._job(self._core, reply.json()), progress=progress))
        return self._trace(self._core, reply.json())

    @operation("createTrace")
    async def submit(self, /, source: Any, *, media: str | None = None, progress: Progress = False, **query: Any) -> J:
        """``replay``, as a job that goes on by itself: ``vm.submit([{"gpa": 0x10040}]).wait().violations`` is ``1``."""
        reply = await self._replay(source, media, progress, query, Prefer="respond-async")
        return self._job(self._core, reply.json())

    async def _replay(self, source: Any, media: str | None, progress: Progress, query: Any, **headers: str) -> Reply:
        body = await self._core.transport.away(body_of, source, media, OCTETS if query.get("record") else TEXT)
        return await self._send("createTrace", body, {**body.query, **query}, progress, **headers)

    async def _send(self, name: str, body: Body, query: Any, progress: Progress, **headers: str) -> Reply:
        """A body in pieces; the reply may take as long as it takes."""
        with reporting(progress, "sent") as report:
            options: dict[str, Any] = {"content": body.reporting(report), "headers": {**body.headers(), **headers}}
            again = not body.once and "publish_every" not in query
            return await self._call(name, query=query, again=again, patience=None, **options)

    @stream("listTraces", "getTrace")
    def traces(self) -> AsyncGenerator[R, None]:
        """Results that are kept, oldest first: ``[trace.violations for trace in vm.traces()][-1]`` is ``1``."""
        return self._core.pages("listTraces", "traces", partial(self._trace, self._core), path=self._place)

    @operation("getTrace")
    async def trace(self, id: str) -> R:
        """A result. Raises NotFound. ``vm.trace(trace.id).records`` is ``2``."""
        return self._trace(self._core, await self._document("getTrace", path={"trace": id}))

    @stream("getExits", "listTraces")
    async def exits(self, trace: str | None = None, limit: int | None = None) -> AsyncGenerator[Document, None]:
        """Exit records of a result, or of the last one: ``[exit["gpa"] for exit in vm.exits()]`` is ``['0x10040']``."""
        if trace is None:
            async for found in VmOperations.traces(self):
                trace = found.id
        if trace is None:
            raise BadInput(f"{self.id} has no results; replay a trace first")
        of = TraceOperations(self._core, {"vm": self.id, "id": trace})
        async with aclosing(TraceOperations.exits(of, limit)) as records:
            async for record in records:
                yield record

    # What happens

    @stream("getEvents")
    def events(
        self,
        /,
        *,
        follow: bool = False,
        after: int | str | None = None,
        kinds: str | Iterable[str] | None = None,
        **query: Any,
    ) -> AsyncGenerator[Document, None]:
        """What happened, oldest first, after the id ``after``; ``"latest"``: what happens once it is being read.
        ``query``: ``gfn``, ``npages``, ``object``, ``expand``. With ``follow`` it goes on until the machine is deleted,
        and by itself after every interruption, a restart of the service included: no event is left out, and none comes
        twice. ``[event["kind"] for event in vm.events()][0]`` is ``'lifecycle'``."""
        chosen = kinds if kinds is None or isinstance(kinds, str) else ",".join(kinds)
        return following(self._core, self.id, {"kinds": chosen, **query}, after, follow)

    @operation("hostMemoryEvent")
    async def host_memory(self, event: str, gfn: int | None = None, npages: int | None = None) -> Document:
        """What a host does: ``unmap``, ``zap`` and others. ``vm.host_memory("zap")["event"]`` is ``'zap'``."""
        return await self._document("hostMemoryEvent", json=members_of(event=event, gfn=gfn, npages=npages))

    @stream("getDirty")
    def dirty(self, /, **query: Any) -> AsyncGenerator[Document, None]:
        """Pages that were written since the last harvest, by ``slot``, or by ``gfn`` and ``npages``; takes nothing.
        ``list(vm.dirty())`` is ``[]``."""
        return self._core.pages("getDirty", "pages", path=self._place, query=query)

    # The processor

    @operation("callVmIoctl", "callVcpuIoctl")
    async def ioctl(
        self, /, name: str, data: bytes | None = None, *, vcpu: int | None = None, **members: Any
    ) -> Document:
        """An ioctl of the machine, or of a ``vcpu``; ``data`` are the bytes at its argument. ``members``: ``arg``,
        ``memory``, ``read_only``. ``vm.ioctl("KVM_CHECK_EXTENSION", arg=0)["errno"] is None`` is ``True``."""
        document = members_of(data=data, **members)
        called, of = ("callVmIoctl", {}) if vcpu is None else ("callVcpuIoctl", {"n": vcpu})
        return await self._document(called, path={"name": name, **of}, json=document)

    @operation("executeHypercall")
    async def hypercall(self, /, vcpu: int = 0, **members: Any) -> Document:
        """A Hyper-V hypercall of a vCPU: by ``call``, or by ``registers``; see docs/tlb-flush.md.
        ``vm.hypercall(call={"name": "HvCallFlushVirtualAddressSpace", "flags": 3, "fast": True})["outcome"]`` is
        ``'native'``."""
        return await self._document("executeHypercall", path={"n": vcpu}, json=members)

    def __repr__(self) -> str:
        return f"<vm {self.id} {self.name!r}>"


class Vm(VmOperations[Trace, Job], Blocking):
    """A machine."""

    _trace, _job = Trace, Job

    def attach(self, handler: Handler, *, workers: int = 8, **wishes: Any) -> Tool:
        """Attach a tool that is asked what becomes of refused accesses, ``workers`` at a time, in threads of its own.

        ``wishes`` are those of docs/introspection.md: ``priority``, ``objects``, ``accesses``, ``ranges``, ``kinds``,
        ``timeout``, ``default_action``. It attaches again after every interruption. Raises Problem, Unreachable. ::

        >>> with vm.attach(lambda question: "allow" if question.gpa == 0x10040 else "skip"):
        ...     vm.access(0x10040, on_violation="ask")["landed"], vm.access(0x10048, on_violation="ask")["landed"]
        (True, False)
        """
        return Tool(self._core, self.id, handler, wishes, workers)


class AsyncVm(VmOperations[AsyncTrace, AsyncJob], Awaiting):
    """A machine, with methods to be awaited."""

    _trace, _job = AsyncTrace, AsyncJob

    def attach(self, handler: Handler, *, workers: int = 8, **wishes: Any) -> AsyncTool:
        """As ``Vm.attach``, for ``async with``; the handler may be a coroutine function."""
        return AsyncTool(self._core, self.id, handler, wishes, workers)
