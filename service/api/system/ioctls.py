"""The binary KVM ABI at its three levels: bytes in, and what ioctl(2) returned, errno and bytes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Path, Query
from pydantic import ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from starlette.requests import Request
from starlette.responses import Response

from engine.abi import SYSTEM, VCPU, VM, Call, Reply, UserBuffer, UserMemory
from engine.errors import NotFound
from engine.ioctls import IOCTLS, NewMachine, Target, as_created
from engine.state.config import HostConfig, VmConfig
from engine.state.profiles import kvm_version
from service.api.common import (
    BINARY,
    VmId,
    changing,
    documented,
    find,
    headers,
    json_response,
    registry_of,
    router,
    settings_of,
    tenant_of,
)
from service.api.machines.vms import HostRequest, Profile
from service.http.idempotency import hooks_of
from service.http.json_bodies import parse
from service.http.negotiation import JSON, OCTETS, content_type, preferred
from service.http.wire_types import Document, Hex64, examples
from service.problems import InvalidDocument
from service.runtime.changes import of_ioctl

routes = router("ioctls", "/v1", reads="read", writes="write")

_HEX = r"^([0-9a-fA-F]{2})*$"
_FIRST_DESCRIPTOR = 3
_SET_FULL = "0020000000000000" + "01000000" + "00000000" + "ffffffff"
_REQUEST = {"data": _SET_FULL}
_REPLY: dict[str, Any] = {"return": 1, "errno": None, "data": _SET_FULL, "memory": []}
_CREATED: dict[str, Any] = {"return": 3, "errno": None, "data": None, "memory": [], "vm": "vm_3f9c2a1be07d4c55"}

IoctlName = Annotated[
    str, Path(alias="name", description="Name of the ioctl.", examples=["KVM_SUBPAGES_SET_ACCESS"], max_length=64)
]
Argument = Annotated[
    Hex64 | None,
    Query(description="Scalar argument of a call without a JSON body.", examples=["0x0"]),
]
VcpuId = Annotated[int, Path(alias="n", ge=0, description="KVM vCPU id.", examples=[0])]


class MemorySegment(Document):
    """Bytes of the caller's memory."""

    addr: Hex64 = Field(description="Where they are, for pointers inside structures.")
    data: str = Field(pattern=_HEX, description="The bytes, hexadecimal in memory order.")


class IoctlRequest(Document):
    """An ioctl's argument and the memory around it."""

    model_config = ConfigDict(json_schema_extra=examples(_REQUEST, {"arg": "0x0"}))

    data: str | None = Field(
        None, pattern=_HEX, description="The bytes at the argument; those past the end fault (EFAULT)."
    )
    arg: Hex64 = Field(0, description="A scalar argument, or a pointer into `memory`; 0 is NULL.")
    read_only: bool = Field(False, description="Copying out faults (EFAULT).")
    memory: list[MemorySegment] = Field(
        default_factory=list, max_length=64, description="The caller's memory that the argument points to."
    )
    host: HostRequest | None = Field(
        None, description="The host under /dev/kvm, the default one unless given; for calls to the system only."
    )
    max_vcpus: int | None = Field(
        None, ge=1, le=1024, description="KVM_CREATE_VM: room for KVM_CREATE_VCPU; null: KVM_CAP_MAX_VCPUS."
    )


class IoctlReply(Document):
    """What the call returned, and the caller's memory as it left it."""

    model_config = ConfigDict(json_schema_extra=examples(_REPLY, _CREATED))

    returns: int = Field(alias="return", description="What ioctl(2) returns: -1, or what the call has to say.")
    errno: str | None = Field(description="Name of errno when it is -1.")
    data: str | None = Field(description="The bytes at the argument; null when none were given.")
    memory: list[MemorySegment] = Field(description="The caller's memory as the call left it.")
    vm: str = Field("", description="Id of the VM that KVM_CREATE_VM made; with that call only.")

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        shown = handler(schema)
        members = handler.resolve_ref_schema(shown)
        members["required"] = [name for name in members["required"] if name != "vm"]
        return shown


_BODY = {
    "requestBody": {
        "required": False,
        "content": {JSON: {"schema": {"$ref": "#/components/schemas/IoctlRequest"}}, OCTETS: BINARY},
    }
}
_KVM_HEADERS = {
    "X-KVM-Return": {
        "description": "What ioctl(2) returned. With an octet-stream.",
        "required": False,
        "schema": {"type": "string"},
    },
    "X-KVM-Errno": {
        "description": "Name of errno, when it returned -1. With an octet-stream.",
        "required": False,
        "schema": {"type": "string"},
    },
}
_ABOUT = (
    "Answered with 200 whenever the call reached the ioctl, whatever that returned. As an octet-stream the body is "
    "the bytes at the argument, before and after; what was returned is in `X-KVM-Return` and `X-KVM-Errno`. An ioctl "
    "that exists but is unknown at this level, or to this kernel, answers as the kernel's dispatch does: EINVAL at the "
    "system and at a vCPU, ENOTTY at a VM."
)


def _documented(*problems: str, made: bool = False) -> dict[int | str, dict[str, Any]]:
    location = {name: {**text, "required": False} for name, text in headers("Location").items()} if made else {}
    reply = {
        "model": IoctlReply,
        "description": "The call was made.",
        "content": {OCTETS: BINARY},
        "headers": {**headers("Vary"), **_KVM_HEADERS, **location},
    }
    return documented(
        {200: reply},
        "malformed-body",
        "not-found",
        "not-acceptable",
        "body-too-large",
        "unsupported-media-type",
        "invalid-value",
        *problems,
    )


@dataclass(frozen=True)
class _Incoming:
    """A call as it arrived, and the form of its answer."""

    call: Call
    media: str
    host: HostConfig = field(default_factory=HostConfig)
    max_vcpus: int | None = None

    def answer(self, reply: Reply, vm: str | None = None) -> Response:
        """The call's answer, with the caller's memory as the call left it."""
        told = {"Vary": "Accept"} | ({"Location": f"/v1/vms/{vm}"} if vm is not None else {})
        data = self.call.user.data
        if self.media == OCTETS:
            told |= {"X-KVM-Return": str(reply.returns)} | ({"X-KVM-Errno": reply.errno} if reply.errno else {})
            return Response(bytes(data or b""), media_type=OCTETS, headers=told)
        document: dict[str, Any] = {
            "return": reply.returns,
            "errno": reply.errno,
            "data": data.hex() if data is not None and not self._pointed_at() else None,
            "memory": [{"addr": hex(addr), "data": part.hex()} for addr, part in self.call.memory.segments],
        }
        return json_response(document | ({"vm": vm} if vm is not None else {}), extra=told)

    def _pointed_at(self) -> bool:
        return any(self.call.user.data is part for _, part in self.call.memory.segments)


async def _incoming(request: Request, level: str, name: str, arg: int | None) -> _Incoming:
    """The call that a request makes. Raises NotFound for an ioctl that no level has."""
    if name not in IOCTLS.names:
        raise NotFound("must be the name of an ioctl that this service answers", field="name", value=name)
    content = await request.body()
    if not content and "content-type" not in request.headers:
        return _Incoming(Call(name, level, arg=arg or 0), preferred(request, (JSON, OCTETS)))
    if content_type(request, (JSON, OCTETS)) == OCTETS:
        call = Call(name, level, UserBuffer.of(content), arg or 0)
        return _Incoming(call, preferred(request, (OCTETS, JSON)))
    if arg is not None:
        raise InvalidDocument("must be a member of the body when that is JSON", field="arg", value=arg)
    body = await parse(IoctlRequest, content, settings_of(request))
    for member in ("host", "max_vcpus"):
        if getattr(body, member) is not None and level != SYSTEM:
            raise InvalidDocument("is for calls to the system only", field=member)
    memory = UserMemory(_segments(body), body.read_only)
    if body.data is not None:
        user = UserBuffer.of(bytes.fromhex(body.data), body.read_only)
    else:
        user = memory.buffer(body.arg)
    host = body.host or HostRequest()
    call = Call(name, level, user, body.arg, memory)
    return _Incoming(call, preferred(request, (JSON, OCTETS)), host.config(), body.max_vcpus)


def _segments(body: IoctlRequest) -> list[tuple[int, bytearray]]:
    """The caller's segments, in the order given. Raises InvalidDocument where two share a byte."""
    segments = [(item.addr, bytearray.fromhex(item.data)) for item in body.memory]
    end = -1
    for position in sorted(range(len(segments)), key=lambda at: segments[at][0]):
        addr, data = segments[position]
        if addr < end or addr + len(data) > 1 << 64:
            raise InvalidDocument(
                "must overlap no other segment and end within 64 bits", field=f"memory[{position}].addr", value=addr
            )
        end = addr + len(data)
    return segments


@routes.post(
    "/ioctls/{name}",
    operation_id="callSystemIoctl",
    summary="Call an ioctl of /dev/kvm",
    description=_ABOUT + " KVM_CREATE_VM makes a VM: `vm` and Location name it.",
    openapi_extra=_BODY,
    responses=_documented("limit-exceeded", made=True),
)
async def call_system_ioctl(
    request: Request,
    name: IoctlName,
    profile: Annotated[Profile, Query(description="Which KVM.")] = "kvm-2019",
    arg: Argument = None,
) -> Response:
    incoming = await _incoming(request, SYSTEM, name, arg)
    config = VmConfig(
        profile=profile,
        vcpus=(),
        vcpu_room=incoming.max_vcpus or kvm_version(profile).limits.vcpus,
        host=incoming.host,
        max_table_frames=settings_of(request).max_table_frames,
    )
    config.validate()
    reply = IOCTLS.perform(Target(profile, incoming.host), incoming.call)
    if not isinstance(reply, NewMachine):
        return incoming.answer(reply)
    entry = await registry_of(request).create(config, (), spp=False, tenant=tenant_of(request), hooks=hooks_of(request))
    as_created(entry.machine)
    return incoming.answer(Reply(_FIRST_DESCRIPTOR + entry.ordinal), entry.id)


@routes.post(
    "/vms/{vm}/ioctls/{name}",
    operation_id="callVmIoctl",
    summary="Call an ioctl of a VM",
    description=_ABOUT,
    openapi_extra=_BODY,
    responses=_documented("vm-busy", "limit-exceeded"),
)
async def call_vm_ioctl(request: Request, vm: VmId, name: IoctlName, arg: Argument = None) -> Response:
    return await _machine_call(request, vm, VM, name, arg, None)


@routes.post(
    "/vms/{vm}/vcpus/{n}/ioctls/{name}",
    operation_id="callVcpuIoctl",
    summary="Call an ioctl of a vCPU",
    description=_ABOUT,
    openapi_extra=_BODY,
    responses=_documented("vm-busy", "limit-exceeded"),
)
async def call_vcpu_ioctl(request: Request, vm: VmId, n: VcpuId, name: IoctlName, arg: Argument = None) -> Response:
    return await _machine_call(request, vm, VCPU, name, arg, n)


async def _machine_call(
    request: Request, vm: str, level: str, name: str, arg: int | None, vcpu: int | None
) -> Response:
    entry = find(request, vm)
    if vcpu is not None:
        entry.machine.config.vcpu_position(vcpu)
    incoming = await _incoming(request, level, name, arg)
    config = entry.machine.config
    if not IOCTLS.changes(entry.machine, level, name):
        target = Target(config.profile, config.host, entry.machine, vcpu)
        return incoming.answer(IOCTLS.perform(target, incoming.call))
    async with changing(request, entry, joins=True) as machine:
        begins = incoming.call.user.copy_from(0, 16) or b""
        reply = IOCTLS.perform(Target(config.profile, config.host, machine, vcpu), incoming.call)
        told = of_ioctl(name, vcpu, begins, reply.returns, reply.errno)
        if told is not None:
            entry.events.note(told.kind, told.detail)
    return incoming.answer(reply)
