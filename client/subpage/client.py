"""The client: one service, its machines and jobs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from subpage.core import Core
from subpage.footprints import AsyncFootprint, Footprint, FootprintCalls
from subpage.html import Document
from subpage.jobs import AsyncJob, Job, JobOperations
from subpage.machines import AsyncVm, Vm, VmOperations
from subpage.modes import Awaiting, Blocking, operation, run, stream
from subpage.transports import AWAITING, BLOCKING, Transport, Way
from subpage.values import members_of, size_of
from subpage.wire import Pieces, Reply

V = TypeVar("V", bound=VmOperations[Any, Any])
J = TypeVar("J", bound=JobOperations[Any])

URL = "http://127.0.0.1:8000"


class ClientOperations(Generic[V, J]):
    """What both clients do."""

    _vm: type[V]
    _job: type[J]
    _way: Way

    def __init__(
        self,
        url: str = URL,
        token: str | None = None,
        *,
        ca: str | Path | None = None,
        timeout: float = 30.0,
        patience: float = 15.0,
        most_bytes: int = 1 << 30,
    ) -> None:
        transport = Transport(self._way, url, ca, timeout)
        self._core = Core(url, token, transport, timeout=timeout, patience=patience, most_bytes=most_bytes)
        self.url = self._core.url
        """Where the service is."""

    @operation()
    async def call(
        self,
        operation_id: str,
        *,
        path: Mapping[str, Any] | None = None,
        query: Mapping[str, Any] | None = None,
        json: Any = None,
        content: bytes | Pieces | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Any operation of the contract, by its id; the reply has ``status``, ``headers``, ``content``, ``json()``.
        Raises Problem, BadInput. ``client.call("getSpp", path={"vm": vm.id}).json()["active"]`` is ``True``."""
        again = content is None or isinstance(content, bytes)
        options: dict[str, Any] = {"json": json, "content": content, "headers": headers}
        return await self._core.call(operation_id, path=path, query=query, again=again, **options)

    @stream("listVms")
    def vms(self) -> AsyncGenerator[V, None]:
        """The machines of the tenant, oldest first: ``vm.id in [found.id for found in client.vms()]`` is ``True``."""
        return self._core.pages("listVms", "vms", partial(self._vm, self._core))

    @operation("getVm")
    async def vm(self, id: str) -> V:
        """One machine. Raises NotFound. ``client.vm(vm.id).name`` is ``'example'``."""
        return self._vm(self._core, await self._core.document("getVm", path={"vm": id}))

    @operation("createVm")
    async def create_vm(
        self, /, name: str = "", *, memory: int | str | None = None, spp: bool = True, **members: Any
    ) -> V:
        """A new machine, with ``memory`` bytes of RAM at address 0, and with SPP enabled.

        ``memory`` may be ``"1GiB"``. ``members`` are those of the contract: ``memory_slots`` for RAM elsewhere,
        ``profile``, ``vcpus``, ``host`` and others. ::

        >>> guest = client.create_vm("guest", memory="16MiB", vcpus=2)
        >>> guest["memory_slots"][0]["size"]
        '0x1000000'
        >>> guest.delete()
        """
        document: dict[str, Any] = {"name": name, "spp": spp, **members}
        if memory is not None:
            slot = {"slot": 0, "gpa": "0x0", "size": hex(size_of(memory))}
            document["memory_slots"] = [slot, *members.get("memory_slots", [])]
        return self._vm(self._core, await self._core.document("createVm", json=document))

    @stream("listJobs")
    def jobs(self) -> AsyncGenerator[J, None]:
        """Jobs of the tenant, oldest first: ``vm.submit([1]).id in [job.id for job in client.jobs()]`` is ``True``."""
        return self._core.pages("listJobs", "jobs", partial(self._job, self._core))

    @operation("getJob")
    async def job(self, id: str) -> J:
        """One job. Raises NotFound. ``client.job(vm.submit([{"gpa": 0x10040}]).id).wait().records`` is ``1``."""
        return self._job(self._core, await self._core.document("getJob", path={"job": id}))

    @operation("getVersion")
    async def version(self) -> Document:
        """Which release the service is: ``client.version()["name"]`` is ``'subpage'``."""
        return await self._core.document("getVersion")

    @operation("getCapabilities")
    async def capabilities(self) -> Document:
        """Profiles, formats, limits, and names: ``client.capabilities()["profiles"][0]`` is ``'kvm-2019'``."""
        return await self._core.document("getCapabilities")

    @operation("getReadyz")
    async def ready(self) -> bool:
        """Whether it serves at full speed; waits for as long as ``patience`` says: ``client.ready()`` is ``True``."""
        return bool((await self._core.document("getReadyz"))["status"] == "ready")

    @operation("callSystemIoctl")
    async def ioctl(self, /, name: str, data: bytes | None = None, **members: Any) -> Document:
        """An ioctl of ``/dev/kvm``; see ``vm.ioctl``. ``profile`` is one of the members.
        ``client.ioctl("KVM_GET_API_VERSION", arg=0)["return"]`` is ``12``."""
        query = {"profile": members.pop("profile", None)}
        document = members_of(data=data, **members)
        return await self._core.document("callSystemIoctl", path={"name": name}, query=query, json=document)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.url}>"


class Client(ClientOperations[Vm, Job], FootprintCalls[Footprint], Blocking):
    """One service, for one token. Use as a context, or close it in the end.

    ``ca``: a PEM file of the authorities to trust, where it is not one that the system trusts. ``timeout``: seconds
    for a connection, and without a byte of a reply. ``patience``: for how many seconds a call that failed for a passing
    reason is tried again; a POST has an idempotency key then, so it is done once. ``most_bytes``: of a reply. ::

    >>> with Client(url) as service:
    ...     service.version()["name"]
    'subpage'
    """

    _vm, _job, _footprint, _way = Vm, Job, Footprint, BLOCKING

    def close(self) -> None:
        """Close its connections."""
        run(self._core.transport.close())

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncClient(ClientOperations[AsyncVm, AsyncJob], FootprintCalls[AsyncFootprint], Awaiting):
    """As ``Client``, for asyncio: its methods are awaited, its streams are read with ``async for``. ::

    >>> async def name():
    ...     async with AsyncClient(url) as service:
    ...         return (await service.version())["name"]
    >>> asyncio.run(name())
    'subpage'
    """

    _vm, _job, _footprint, _way = AsyncVm, AsyncJob, AsyncFootprint, AWAITING

    async def aclose(self) -> None:
        """Close its connections."""
        await self._core.transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()
