"""Every knob of the service: from the command line, the environment (prefix ``SUBPAGE_``) or a file, in that order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from engine.trace.option_names import DefaultAnswer
from scale.cluster import CLUSTERS, is_place
from service.platform.failures import FileError, read_document
from service.platform.sockets import Allowed
from service.platform.source_places import Place
from service.storage.urls import StoreUrl, default_store

MIB = 1 << 20
GIB = 1 << 30


# The variable that names a file of settings.
CONFIG_VARIABLE = "SUBPAGE_CONFIG"


class BadFile(Exception):
    """The file of settings cannot be read."""


def file_settings() -> dict[str, Any]:
    """The settings in the TOML file that SUBPAGE_CONFIG names; none without one. Raises BadFile."""
    path = os.environ.get(CONFIG_VARIABLE)
    if not path:
        return {}
    try:
        return read_document(Path(path), toml=True)
    except FileError as error:
        raise BadFile(f"{CONFIG_VARIABLE}: {error}") from None


class _FileSource(PydanticBaseSettingsSource):
    """The file, where neither a flag nor the environment says something."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return file_settings()


class Settings(BaseSettings):
    """Immutable for the life of an application. Sizes are bytes, times are seconds unless the name says otherwise."""

    model_config = SettingsConfigDict(env_prefix="SUBPAGE_", frozen=True, extra="forbid")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _FileSource(settings_cls)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one and prints it.")

    store: str = Field(
        default_factory=lambda: default_store(dict(os.environ), Path.home()),
        description="Where machines are kept: sqlite:///path, postgresql://user:password@host/database, or memory.",
    )
    max_loaded_vms: int = Field(64, ge=1, description="Machines kept in memory while nobody uses them.")

    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field(
        "warning", description="The least severe of what is logged."
    )
    log_format: Literal["text", "json"] = Field("text", description="Logs for people, or a JSON object for each line.")
    access_log: bool = Field(False, description="Log every request.")
    metrics_public: bool = Field(False, description="Serve /metrics without a token.")
    telemetry: bool = Field(
        False, description="Send traces and metrics by OpenTelemetry as the OTEL_… variables say; extra `telemetry`."
    )
    token: SecretStr | None = Field(
        None, min_length=32, description="A token with scope admin for the default tenant, besides those that are kept."
    )
    token_file: Path | None = Field(None, description="SQLite file for tokens alone; without it they are in the store.")
    token_refresh: float = Field(2.0, gt=0, description="How long a change of the tokens may take to be noticed.")
    rate_limit: float = Field(0, ge=0, description="Requests a second that one token may make; 0: any number.")
    rate_burst: int = Field(100, ge=1, description="Requests that one token may make at once before rate_limit holds.")
    audit_log: str | None = Field(
        None, description="File of the audit log, - for standard error; by default - when tokens are needed, else none."
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="Origins whose web pages may call the service; none by default."
    )
    tls_certificate: Path | None = Field(None, description="PEM file of the certificate chain; switches TLS on.")
    tls_key: Path | None = Field(None, description="PEM file of its private key, unless it is in the same file.")
    tls_key_password: SecretStr | None = Field(None, description="Password of the private key.")
    tls_client_ca: Path | None = Field(
        None, description="PEM file of authorities; clients must show a certificate of one."
    )

    max_body_bytes: int = Field(GIB, ge=1, description="Largest body of a trace.")
    body_memory_bytes: int = Field(
        256 * MIB,
        ge=MIB,
        description=(
            "Memory that the batches, dictionaries and pages of one Arrow or Parquet body may take while it is read, "
            "found out before they are decoded: a body of some kilobytes can claim gigabytes."
        ),
    )
    max_body_memory_bytes: int = Field(
        GIB, ge=MIB, description="The same of all such bodies that are read at one time, over all tenants."
    )
    footprint_memory_bytes: int = Field(
        512 * MIB, ge=MIB, description="Memory that one footprint may take while it is built, or asked."
    )
    max_footprint_memory_bytes: int = Field(
        768 * MIB,
        ge=MIB,
        description="The same of all footprints that are built or asked at one time, over all tenants.",
    )
    footprint_seconds: float = Field(
        120, ge=0, description="Seconds that one question about a footprint may take to compute; 0: any time."
    )
    footprint_sources: tuple[str, ...] = Field(
        (),
        description="Where `POST /v1/footprints:build` may read traces: `/DIRECTORY`, `s3://BUCKET/PREFIX` or "
        "`gs://BUCKET/PREFIX`, perhaps with `?endpoint_override=HOST:PORT&scheme=http` behind it, for one tenant with "
        "`TENANT=` before it; nowhere by default. Whoever may write counts what is there.",
    )
    max_source_files: int = Field(1000, ge=1, le=1 << 16, description="Files that one such footprint may be of.")
    max_source_bytes: int = Field(
        64 * GIB, ge=1, description="Bytes that they may have together, and what one of them may unpack to."
    )
    source_seconds: float = Field(3600, ge=0, description="Seconds that reading them may take; 0: any time.")
    ray_address: str | None = Field(
        None,
        description="A cluster of Ray that they are handed to: `local`, `auto`, `HOST:PORT` or `ray://HOST:PORT`; "
        "without one they are read here. Needs the extra `scale`.",
    )
    loaded_footprint_bytes: int = Field(
        256 * MIB,
        ge=0,
        description="Memory of footprints that were asked before, and are kept there to be asked again.",
    )
    max_document_bytes: int = Field(32 * MIB, ge=1, description="Largest body of every other call.")
    max_held_body_bytes: int = Field(
        256 * MIB,
        ge=1,
        description="Bytes of bodies, other than traces, in memory at one time; one tenant may have half of it.",
    )
    max_document_values: int = Field(
        1_310_720, ge=1000, description="Values in one JSON document; its members and objects count four times each."
    )
    head_timeout: float = Field(15, ge=0, description="Seconds that the head of a request may take; 0: any time.")
    body_timeout: float = Field(
        30,
        ge=0,
        description="Seconds to wait for a body, and one more for each body_rate bytes; 0: any time.",
    )
    body_rate: int = Field(500, ge=1, description="Bytes a second below which a body becomes too slow.")
    spool_memory_bytes: int = Field(
        MIB, ge=0, description="Parquet bodies of calls larger than this go to a file; 0: all of them."
    )
    spool_dir: Path | None = Field(None, description="Folder of spooled bodies; the system's own by default.")
    body_queue_bytes: int = Field(8 * MIB, ge=1, description="Bytes of one body that may wait for its replay.")

    idempotency_seconds: float = Field(86400, gt=0, description="How long the answer under an Idempotency-Key is kept.")
    idempotency_bytes: int = Field(64 * MIB, ge=0, description="What the kept answers of one token may take together.")

    max_vms: int = Field(64, ge=1, description="Machines that may exist at one time, over all tenants.")
    max_memory_bytes: int = Field(
        GIB, ge=MIB, description="Bytes that the frames of all machines may take together, over all tenants."
    )
    max_loaded_bytes: int = Field(
        512 * MIB, ge=0, description="Bytes of machines kept in memory while nobody uses them and a store has them."
    )
    max_memory_slots: int = Field(512, ge=1, description="Memory slots that one machine may have.")
    max_table_frames: int = Field(
        1 << 16, ge=16, description="4 KiB frames (tables, guest memory, bitmaps) one machine may use."
    )
    max_subpage_window: int = Field(1 << 20, ge=1, le=1 << 20, description="Pages one sub-page call may cover.")
    max_image_bytes: int = Field(
        64 * GIB, ge=1, description="Largest memory image, in bytes as decoded, its pages of zeros included."
    )
    max_image_memory_bytes: int = Field(
        384 * MIB,
        ge=0,
        description="What the pages of memory images, those of zeros left out, may take in one machine beside "
        "max_table_frames.",
    )
    memory_files: tuple[Path, ...] = Field(
        (),
        description="Directories whose files may be behind memory slots, read-only; none by default. Whoever may write "
        "reads what is there; `{tenant}` in one stands for the name of the tenant.",
    )
    max_memory_files: int = Field(256, ge=0, description="Files behind memory slots that are open at one time.")
    max_memory_window: int = Field(64 * MIB, ge=1, description="Bytes of guest memory one call may cover.")

    busy_timeout: float = Field(5.0, ge=0, description="How long a mutation waits for its machine before 409 vm-busy.")
    max_replays: int = Field(
        128, ge=1, description="Replays that may be under way at one time, their bodies still arriving or not."
    )
    replay_threads: int = Field(32, ge=1, description="Replays that compute at one time, over all machines.")
    running_jobs: int = Field(4, ge=1, description="Jobs that run at one time, each on another machine.")
    max_queued_jobs: int = Field(100, ge=0, description="Jobs that may wait for their turn; 429 beyond that.")
    max_job_bytes: int = Field(
        4 * GIB,
        ge=0,
        description="Bytes that the bodies of unfinished jobs, and Parquet bodies of calls, may take together.",
    )
    async_body_bytes: int = Field(
        0, ge=0, description="Traces of at least so many declared bytes become jobs without being asked to; 0: none."
    )
    longest_wait: float = Field(300, ge=0, description="What `Prefer: wait` is cut to.")
    kept_job_seconds: float = Field(86400, ge=0, description="How long a job is known after its end.")
    kept_jobs: int = Field(10_000, ge=1, description="Ended jobs that are known at one time; the oldest go first.")
    drain_seconds: float = Field(
        0, ge=0, description="How long /readyz answers 503 before the service stops to accept connections."
    )
    shutdown_timeout: int = Field(
        10, ge=0, description="Seconds that requests and running jobs have to end when the service stops."
    )
    warm_up: bool | Literal["first"] = Field(
        True,
        description="Compile and load the kernels before /readyz answers 200: all, or first those of the main job; a "
        "request that needs another one then waits while it is compiled, and so do all others.",
    )

    ask_timeout: float = Field(
        30, gt=0, description="Seconds that an introspection tool has for an answer unless it says another time itself."
    )
    ask_default_action: DefaultAnswer = Field(
        "skip", description="What becomes of a refused access that was to be asked about when no tool answers."
    )
    max_tools: int = Field(16, ge=1, description="Introspection tools that may be attached to one machine.")
    kvmi_sockets: tuple[str, ...] = Field(
        (),
        description="Where tools of KVMI may listen: `unix:DIRECTORY`, `vsock:CID` or `vsock:CID:PORT`, for one tenant "
        "with `TENANT=` before it.",
    )
    max_questions: int = Field(64, ge=1, description="Accesses of one machine that may wait for an answer at a time.")

    page_size: int = Field(100, ge=1, description="Items in one page of a list when no limit is given.")
    max_page_size: int = Field(1000, ge=1, description="Largest limit of a list.")
    exit_page_size: int = Field(1000, ge=1, description="Exit records in one JSON page, and inlined in a trace result.")
    max_exit_records: int = Field(10_000_000, ge=0, description="Largest max_exit_records of one trace; its default.")
    kept_traces: int = Field(100, ge=1, description="Trace results kept per machine; the oldest go first.")
    kept_exit_records: int = Field(20_000_000, ge=0, description="Exit records kept per machine over all its traces.")
    kept_trace_days: float = Field(30, ge=0, description="Trace results older than this go; 0 keeps them.")
    kept_footprints: int = Field(100, ge=1, description="Footprints kept per tenant; the oldest go first.")
    kept_footprint_bytes: int = Field(
        256 * MIB,
        ge=1,
        description="Bytes of the files of one tenant's footprints; the oldest go first, the newest stays.",
    )
    kept_footprint_days: float = Field(30, ge=0, description="Footprints older than this go; 0 keeps them.")
    max_policies: int = Field(10_000, ge=1, le=1 << 17, description="Policies whose cost one call may ask for.")
    kept_events: int = Field(
        20_000, ge=1, description="Rows of one machine's event log that are kept; a replay's violations are one."
    )
    kept_event_days: float = Field(30, ge=0, description="Events older than this go; 0 keeps them.")
    event_heartbeat: float = Field(15.0, gt=0, description="How often an idle stream of events shows that it lives.")
    max_event_streams: int = Field(20_000, ge=1, description="Streams of events that may be open at one time.")
    loaded_exit_records: int = Field(
        2_000_000, ge=0, description="Exit records kept in memory per machine; the store has the others."
    )

    @field_validator("memory_files")
    @classmethod
    def _absolute(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        for directory in value:
            if not directory.is_absolute() or ".." in directory.parts:
                raise ValueError(f"a directory is an absolute path without ..: {directory}")
        return value

    @model_validator(mode="after")
    def _one_within_all(self) -> Self:
        one, most = self.footprint_memory_bytes, self.max_footprint_memory_bytes
        if "footprint_memory_bytes" in self.model_fields_set and one > most:
            raise ValueError(f"footprint_memory_bytes is at most max_footprint_memory_bytes, {most}: {one}")
        return self

    @field_validator("kvmi_sockets")
    @classmethod
    def _known_sockets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            Allowed.parse(text)
        return value

    @field_validator("footprint_sources")
    @classmethod
    def _known_places(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            Place.parse(text)
        return value

    @field_validator("ray_address")
    @classmethod
    def _known_cluster(cls, value: str | None) -> str | None:
        if value is not None and not is_place(value):
            raise ValueError(f"must be {CLUSTERS}: {value!r}")
        return value

    @field_validator("store")
    @classmethod
    def _known_store(cls, value: str) -> str:
        StoreUrl.parse(value)
        return value
