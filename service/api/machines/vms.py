"""Virtual machines: create, list, read, delete."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from fastapi import Body
from pydantic import ConfigDict, Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import Response

from engine.arch.hyperv_cpuid import CpuidEntry
from engine.state.config import HostConfig, VcpuConfig, VmConfig
from engine.state.profiles import ProfileName
from service.api.common import (
    EXAMPLE_VM,
    Cursor,
    Limit,
    VmId,
    documented,
    encode,
    find,
    guard,
    headers,
    held_tag,
    registry_of,
    router,
    settings_of,
    tagged_reply,
    tenant_of,
    vm_tag,
)
from service.api.memory.memory_slots import MemorySlot, NumberedSlotRequest, check_slots
from service.http import cursors
from service.http.conditional import not_modified
from service.http.idempotency import hooks_of
from service.http.negotiation import JSON
from service.http.wire_types import Document, Hex32, Hex64, examples
from service.platform.stamps import moment, stamp
from service.runtime.entry import Entry, Listed
from service.runtime.offload import maybe_in_thread

routes = router("vms", "/v1/vms", reads="read", writes="write")

# Positions are moments of creation.
_CURSOR = "vms by moment"

# Only what cannot be turned into a configuration is refused here; whether one makes sense is for the engine to say.
_MOST_VCPUS = 1024
# vCPUs, their CPUID leaves and memory slots: more than this are rendered off the event loop.
_INLINE_PARTS = 300
# A page ends with the machine that takes it past so many bytes, whatever the limit.
_PAGE_BYTES = 8 << 20

Profile = ProfileName
TranslationCache = Literal["off", "model"]
FlushPolicy = Literal["kvm", "tlfs"]
FlushExecution = Literal["exact", "kvm", "paranoid"]


class CpuidLeafRequest(Document):
    """One CPUID leaf, as in struct kvm_cpuid_entry2."""

    function: Hex32 = Field(description="Leaf: EAX at CPUID.")
    index: Hex32 = Field(0, description="Sub-leaf: ECX at CPUID.")
    eax: Hex32 = Field(0, description="What CPUID leaves in EAX.")
    ebx: Hex32 = Field(0, description="What CPUID leaves in EBX.")
    ecx: Hex32 = Field(0, description="What CPUID leaves in ECX.")
    edx: Hex32 = Field(0, description="What CPUID leaves in EDX.")


class CpuidLeaf(CpuidLeafRequest):
    """One CPUID leaf as it is."""


class CpuidLeafWithFlags(CpuidLeafRequest):
    """The same with its flags."""

    flags: Hex32 = Field(0, description="Bit 0: the index matters.")


class VcpuRequest(Document):
    """One vCPU."""

    id: int = Field(ge=0, le=0xFFFF, description="KVM vCPU id; `vcpu` in traces.")
    vp_index: int | None = Field(None, ge=0, le=0xFFFFFFFF, description="Hyper-V VP index; the id unless given.")
    cpuid: list[CpuidLeafWithFlags] = Field(default_factory=list, max_length=256, description="Leaves that it has.")


class Vcpu(Document):
    """One vCPU as it is."""

    id: int = Field(description="KVM vCPU id.")
    vp_index: int | None = Field(description="Null while it is the id and was not given.")
    cpuid: list[CpuidLeaf] = Field(description="As it is now; `vcpus/{n}/cpuid` has the flags, too.")


class HypervHost(Document):
    """Hyper-V under KVM."""

    cpuid: list[CpuidLeafRequest] = Field(
        default_factory=list,
        max_length=256,
        description="Leaves from 0x40000000 on that it shows to KVM; others are those of a Hyper-V of 2019.",
    )
    fail_allocation: bool = Field(False, description="KVM gets no page when it first enables direct TLB flush.")


class HostRequest(Document):
    """The host under KVM; the defaults are an Ice Lake server."""

    vendor: Literal["intel", "amd"] = Field("intel", description="Whose processor it is.")
    ept: bool = Field(True, description="Whether KVM uses EPT, or NPT.")
    spp: bool = Field(True, description="Whether the processor has sub-page write permission.")
    nested: bool | None = Field(None, description="Null: true, but false for `kvm-latest` with SPP.")
    evmcs: bool | None = Field(
        None, description="KVM, as a guest of Hyper-V, uses the enlightened VMCS itself. Null: if it is recommended."
    )
    vmx_capabilities: dict[str, Hex64] = Field(
        default_factory=dict,
        max_length=64,
        description=(
            "Capability MSRs by name: `ept_vpid_cap`, `procbased_ctls2` and `procbased_ctls3` are the processor's, "
            "`IA32_VMX_…` what KVM shows to a guest hypervisor."
        ),
    )
    hyperv: HypervHost | None = Field(None, description="Hyper-V as L0 under KVM: its CPUID leaves.")
    fail_allocation: int | None = Field(
        None,
        ge=1,
        le=0xFFFFFFFF,
        description="Which allocation of the host fails, 1 the next; null: none. Counted are a bitmap for each slot "
        "when SPP comes on, the buffer of each GET or SET through the ioctls of `kvm-latest`, and what a vCPU needs "
        "when it enters VMX operation.",
    )
    nested_evmcs: bool = Field(True, description="KVM offers its guests an enlightened VMCS (CONFIG_KVM_HYPERV).")
    smt: bool = Field(True, description="Hardware threads may share a core.")

    def config(self) -> HostConfig:
        return HostConfig(**self.model_dump())


class Host(HostRequest):
    """The host as it is."""


_HOST = {
    "vendor": "intel",
    "ept": True,
    "spp": True,
    "nested": None,
    "evmcs": None,
    "vmx_capabilities": {},
    "hyperv": None,
    "fail_allocation": None,
    "nested_evmcs": True,
    "smt": True,
}
_SLOT = {
    "slot": 0,
    "address_space": 0,
    "gpa": "0x0",
    "size": "0x40000000",
    "read_only": False,
    "log_dirty": False,
    "host_page_size": 4096,
    "userspace_addr": "0x0",
    "backing": None,
}
_CREATE = {"name": "guest", "vcpus": 2, "memory_slots": [{"slot": 0, "gpa": "0x0", "size": "0x40000000"}], "spp": True}
_REPLY = {
    "id": EXAMPLE_VM,
    "name": "guest",
    "profile": "kvm-2019",
    "vcpus": [{"id": 0, "vp_index": None, "cpuid": []}, {"id": 1, "vp_index": None, "cpuid": []}],
    "maxphyaddr": 46,
    "host": _HOST,
    "memory_slots": [_SLOT],
    "spp": True,
    "translation_cache": "off",
    "require_match": False,
    "flush_policy": "kvm",
    "flush_execution": "kvm",
    "revision": 1,
    "created": "2026-08-22T09:30:00.000000Z",
}


def _list_or_count(value: Any) -> str:
    return "(list)" if isinstance(value, list) else "(count)"


_VcpuCount = Annotated[int, Field(ge=1, le=_MOST_VCPUS), Tag("(count)")]
_VcpuList = Annotated[list[VcpuRequest], Field(min_length=1, max_length=_MOST_VCPUS), Tag("(list)")]


class VmRequest(Document):
    """A VM to be created."""

    model_config = ConfigDict(json_schema_extra=examples(_CREATE))

    name: str = Field("", max_length=200, description="A label; need not be unique.")
    profile: Profile = Field("kvm-2019", description="Which KVM.")
    vcpus: _VcpuCount | _VcpuList = Field(
        1, description="How many, or which.", discriminator=Discriminator(_list_or_count)
    )
    maxphyaddr: int = Field(46, ge=0, le=64, description="Width of guest-physical addresses in bits.")
    host: HostRequest = Field(default_factory=HostRequest, description="The host under KVM.")
    memory_slots: list[NumberedSlotRequest] = Field(default_factory=list, max_length=512, description="Its RAM.")
    spp: bool = Field(False, description="Enable SPP at once.")
    translation_cache: TranslationCache = Field("off", description="`model` keeps stale translations until flushed.")
    require_match: bool = Field(False, description="Demand If-Match on every change (428 without).")
    flush_policy: FlushPolicy = Field("kvm", description="Whose reading of a flush hypercall: KVM's, or the TLFS.")
    flush_execution: FlushExecution | None = Field(
        None, description="Null: `kvm` under `kvm`, `exact` under `tlfs`. `paranoid` drops everything."
    )

    def config(self, max_table_frames: int) -> VmConfig:
        if isinstance(self.vcpus, int):
            vcpus = tuple(VcpuConfig(n) for n in range(self.vcpus))
        else:
            vcpus = tuple(
                VcpuConfig(vcpu.id, vcpu.vp_index, tuple(leaf.model_dump() for leaf in vcpu.cpuid))
                for vcpu in self.vcpus
            )
        return VmConfig(
            name=self.name,
            profile=self.profile,
            vcpus=vcpus,
            maxphyaddr=self.maxphyaddr,
            translation_cache=self.translation_cache,
            host=self.host.config(),
            require_match=self.require_match,
            max_table_frames=max_table_frames,
            flush_policy=self.flush_policy,
            flush_execution=self.flush_execution,
        )


class Vm(Document):
    """A VM as it is."""

    model_config = ConfigDict(json_schema_extra=examples(_REPLY))

    id: str = Field(description="Id of the VM.")
    name: str = Field(description="Its label.")
    profile: str = Field(description="Which KVM.")
    vcpus: list[Vcpu] = Field(description="By id.")
    maxphyaddr: int = Field(description="Width of guest-physical addresses in bits.")
    host: Host = Field(description="The host under KVM.")
    memory_slots: list[MemorySlot] = Field(description="By number.")
    spp: bool = Field(description="Whether SPP is enabled.")
    translation_cache: str = Field(description="Whether stale translations are modelled.")
    require_match: bool = Field(description="Whether changes must have If-Match.")
    flush_policy: str = Field(description="By whose rules flush calls are served.")
    flush_execution: str = Field(description="How flush hypercalls are carried out.")
    revision: int = Field(description="Counts committed changes, replays included; part of the entity tag.")
    created: str = Field(description="RFC 3339, UTC.", json_schema_extra={"format": "date-time"})


async def rendered(shown: Listed) -> bytes:
    """The JSON of a machine, a ``Vm``."""
    leaves = sum(len(cpuid) for _, cpuid in shown.summary.identities)
    parts = len(shown.summary.identities) + len(shown.summary.slots) + leaves
    return await maybe_in_thread(parts <= _INLINE_PARTS, _rendered, shown)


def _rendered(shown: Listed) -> bytes:
    """Part by part: a model of all of them would keep the interpreter from others for seconds, in a thread, too."""
    summary = shown.summary
    config, host = summary.config, summary.config.host
    vcpus = [
        _vcpu(vcpu, vp_index, cpuid) for vcpu, (vp_index, cpuid) in zip(config.vcpus, summary.identities, strict=True)
    ]
    host_document = Host(
        vendor=host.vendor,  # type: ignore[arg-type]
        ept=host.ept,
        spp=host.spp,
        nested=host.nested,
        evmcs=host.evmcs,
        vmx_capabilities=dict(host.vmx_capabilities),
        hyperv=HypervHost.model_validate(host.hyperv) if host.hyperv is not None else None,
        fail_allocation=summary.failing,
        nested_evmcs=host.nested_evmcs,
        smt=host.smt,
    )
    document = {
        "id": shown.id,
        "name": config.name,
        "profile": config.profile,
        "vcpus": vcpus,
        "maxphyaddr": config.maxphyaddr,
        "host": msgspec.Raw(host_document.model_dump_json().encode()),
        "memory_slots": [msgspec.Raw(MemorySlot.of(spec).model_dump_json().encode()) for spec in summary.slots],
        "spp": summary.spp_active,
        "translation_cache": config.translation_cache,
        "require_match": config.require_match,
        "flush_policy": config.flush_policy,
        "flush_execution": config.executes_flushes,
        "revision": shown.revision,
        "created": stamp(shown.created),
    }
    return msgspec.json.encode(document)


def _vcpu(vcpu: VcpuConfig, vp_index: int, cpuid: tuple[CpuidEntry, ...]) -> msgspec.Raw:
    """The JSON of a ``Vcpu``."""
    leaves = [{name: hex(getattr(leaf, name)) for name in CpuidLeaf.model_fields} for leaf in cpuid]
    told = None if vcpu.vp_index is None and vp_index == vcpu.id else vp_index
    return msgspec.Raw(msgspec.json.encode({"id": vcpu.id, "vp_index": told, "cpuid": leaves}))


class VmPage(Document):
    """A page of VMs, oldest first."""

    model_config = ConfigDict(json_schema_extra=examples({"vms": [_REPLY], "next": None}))

    vms: list[Vm] = Field(description="Oldest first.")
    next: str | None = Field(description="URL of the next page; null on the last.")


@routes.post(
    "",
    operation_id="createVm",
    summary="Create a VM",
    status_code=201,
    responses=documented(
        {201: {"model": Vm, "description": "Created.", "headers": headers("Location", "ETag")}},
        "malformed-body",
        "unsupported",
        "out-of-memory",
        "body-too-large",
        "unsupported-media-type",
        "invalid-value",
        "limit-exceeded",
    ),
)
async def create_vm(request: Request, body: Annotated[VmRequest, Body()]) -> Response:
    config = body.config(settings_of(request).max_table_frames)
    check_slots(settings_of(request), len(body.memory_slots))
    slots = [slot.spec(slot.slot, backing=await slot.attached(request)) for slot in body.memory_slots]
    entry = await registry_of(request).create(
        config, slots, spp=body.spp, tenant=tenant_of(request), hooks=hooks_of(request)
    )
    return await created_reply(entry)


async def created_reply(entry: Entry) -> Response:
    """What is answered to whoever had a machine made."""
    told = {"ETag": vm_tag(entry), "Location": f"/v1/vms/{entry.id}"}
    return Response(await rendered(entry.listed), 201, media_type=JSON, headers=told)


@routes.get(
    "",
    operation_id="listVms",
    summary="List VMs",
    responses=documented({200: {"model": VmPage, "description": "One page, oldest first."}}, "invalid-value"),
)
async def list_vms(request: Request, limit: Limit = None, cursor: Cursor = None) -> Response:
    settings = settings_of(request)
    size = cursors.page_limit(limit, settings.page_size, settings.max_page_size)
    after = cursors.decode(_CURSOR, cursor) if cursor is not None else 0
    shown, following = await registry_of(request).page(tenant_of(request), after, size)
    vms: list[bytes] = []
    octets = 0
    for position, one in enumerate(shown):
        vms.append(await rendered(one))
        octets += len(vms[-1])
        if octets > _PAGE_BYTES and position + 1 < len(shown):
            following = moment(one.created)
            break
    follow = cursors.next_url("/v1/vms", _CURSOR, following, limit) if following is not None else None
    return Response(b'{"vms":[%b],"next":%b}' % (b",".join(vms), encode(follow)), media_type=JSON)


@routes.get(
    "/{vm:id}",
    operation_id="getVm",
    summary="Read a VM",
    responses=documented(
        tagged_reply(Vm, "The VM."),
        "not-found",
    ),
)
async def get_vm(request: Request, vm: VmId) -> Response:
    shown = find(request, vm).listed
    tag = {"ETag": vm_tag(shown)}
    if not_modified(request, tag["ETag"]):
        return Response(status_code=304, headers=tag)
    return Response(await rendered(shown), media_type=JSON, headers=tag)


@routes.delete(
    "/{vm:id}",
    operation_id="deleteVm",
    summary="Delete a VM",
    status_code=204,
    response_description="Deleted.",
    responses=documented({}, "not-found", "vm-busy", "precondition-failed", "precondition-required"),
)
async def delete_vm(request: Request, vm: VmId) -> Response:
    entry = find(request, vm)
    async with entry.mutation(hooks_of(request)) as change:
        guard(request, entry, lambda: [held_tag(entry)])
        change.deletes = True
    return Response(status_code=204)
