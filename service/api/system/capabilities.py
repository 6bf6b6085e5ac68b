"""What this release of the service can do, and within which limits."""

from __future__ import annotations

from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.arch import controls as ctl
from engine.arch import ept
from engine.arch.exits import NAMES
from engine.arch.sppt import SUBPAGE_SIZE
from engine.arch.vmx_msrs import MSR_BY_NAME
from engine.kvm.resolutions import RESOLUTION_NAMES
from engine.state.config import TRANSLATION_CACHES
from engine.state.profiles import PROFILES, kvm_version
from engine.trace.columns import COLUMNS
from engine.trace.option_names import ON_VIOLATION, RECORD_FORMATS, TOOL_FORMATS
from service import __version__
from service.api.common import (
    documented,
    router,
    settings_of,
    tagged,
    tagged_reply,
)
from service.api.traces.bodies import FORMATS
from service.http.wire_types import Document, examples

routes = router("service", "/v1/capabilities", reads="read")

_REPLY = {
    "version": __version__,
    "profiles": list(PROFILES),
    "translation_caches": list(TRANSLATION_CACHES),
    "trace_content_types": list(FORMATS),
    "record_formats": list(RECORD_FORMATS),
    "trace_formats": list(TOOL_FORMATS),
    "columns": ["gpa", "size", "access", "vcpu", "gva"],
    "reserved_columns": [],
    "on_violation": list(ON_VIOLATION),
    "exit_reasons": {"48": "EPT violation"},
    "resolutions": ["violation"],
    "limits": {"max_body_bytes": 1073741824, "max_vms": 64},
    "spp": {
        "msr": "0x48b",
        "msr_bit": 55,
        "secondary_control": "0x800000",
        "vmcs_field": "0x2030",
        "ept_leaf_bit": 61,
        "subpage_bytes": 128,
        "profiles": {
            "kvm-2019": {
                "series": "v4",
                "enable_call": "KVM_INIT_SPP",
                "capability": None,
                "check_extension": 0,
                "max_pages": 64,
                "exit_spp": 28,
            }
        },
    },
}


class SppProfile(Document):
    """The numbers that one KVM gives to sub-page write permission."""

    series: str = Field(description="Version of the patch series.")
    enable_call: str = Field(description="The ioctl that enables it.")
    capability: int | None = Field(description="Number of KVM_CAP_X86_SPP; null where there is none.")
    check_extension: int = Field(description="What KVM_CHECK_EXTENSION says about it.")
    max_pages: int = Field(description="Pages of one GET or SET through the ABI.")
    exit_spp: int = Field(description="Number of KVM_EXIT_SPP.")


class SppCapability(Document):
    """Where the processor says and is told that it has sub-page write permission, and what each profile calls it."""

    msr: str = Field(description="IA32_VMX_PROCBASED_CTLS2.")
    msr_bit: int = Field(description="The bit of it that says whether there is SPP.")
    secondary_control: str = Field(description="Secondary processor-based control 23.")
    vmcs_field: str = Field(description="SPPT pointer.")
    ept_leaf_bit: int = Field(description="Bit of an EPT leaf that hands writes to the SPPT.")
    subpage_bytes: int = Field(description="Size of a sub-page.")
    profiles: dict[str, SppProfile] = Field(description="By the name of the profile.")


class Capabilities(Document):
    """Names that this release knows; later ones add names and remove none."""

    model_config = ConfigDict(json_schema_extra=examples(_REPLY))

    version: str = Field(description="Of the service.")
    profiles: list[str] = Field(description="KVMs that a VM can have.")
    translation_caches: list[str] = Field(description="Values of `translation_cache`.")
    trace_content_types: list[str] = Field(description="Media types of traces.")
    record_formats: list[str] = Field(description="Values of `record` for packed bodies.")
    trace_formats: list[str] = Field(description="Values of `format`: what tools write.")
    columns: list[str] = Field(description="Trace columns with a meaning.")
    reserved_columns: list[str] = Field(description="Trace columns that are refused until they work: none.")
    on_violation: list[str] = Field(description="Values of `on_violation`.")
    exit_reasons: dict[str, str] = Field(description="Basic exit reasons by number.")
    resolutions: list[str] = Field(description="Values of `resolution` in exit records.")
    limits: dict[str, int] = Field(description="Settings that bound requests, by name.")
    spp: SppCapability = Field(description="Sub-page write permission in the processor and in KVM.")


def _spp() -> SppCapability:
    return SppCapability(
        msr=hex(MSR_BY_NAME["IA32_VMX_PROCBASED_CTLS2"]),
        msr_bit=32 + ctl.SECONDARY_SPP.bit_length() - 1,
        secondary_control=hex(ctl.SECONDARY_SPP),
        vmcs_field=hex(ctl.ENCODING_SPPTP),
        ept_leaf_bit=ept.SPP.bit_length() - 1,
        subpage_bytes=SUBPAGE_SIZE,
        profiles={
            name: SppProfile(
                **{member: getattr(kvm_version(name).subpages, member) for member in SppProfile.model_fields}
            )
            for name in PROFILES
        },
    )


@routes.get(
    "",
    operation_id="getCapabilities",
    summary="What the service can do",
    responses=documented(tagged_reply(Capabilities, "Capabilities and limits.")),
)
async def get_capabilities(request: Request) -> Response:
    settings = settings_of(request)
    limits = {
        name: getattr(settings, name)
        for name in (
            "max_body_bytes",
            "max_document_bytes",
            "max_vms",
            "max_table_frames",
            "max_subpage_window",
            "max_memory_window",
            "max_image_bytes",
            "max_image_memory_bytes",
            "max_source_files",
            "max_source_bytes",
            "max_page_size",
            "exit_page_size",
            "max_exit_records",
            "kept_traces",
            "kept_exit_records",
        )
    }
    return tagged(
        request,
        Capabilities(
            version=__version__,
            profiles=list(PROFILES),
            translation_caches=list(TRANSLATION_CACHES),
            trace_content_types=list(FORMATS),
            record_formats=list(RECORD_FORMATS),
            trace_formats=list(TOOL_FORMATS),
            columns=[column.name for column in COLUMNS],
            reserved_columns=[],
            on_violation=list(ON_VIOLATION),
            exit_reasons={str(number): name for number, name in NAMES.items()},
            resolutions=list(RESOLUTION_NAMES),
            limits=limits,
            spp=_spp(),
        ),
    )
