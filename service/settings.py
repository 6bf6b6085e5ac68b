"""Every knob of the service, from the environment (prefix ``SUBPAGE_``) or from the command line."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.storage.urls import StoreUrl, default_store

MIB = 1 << 20
GIB = 1 << 30


class Settings(BaseSettings):
    """Immutable for the life of an application. Sizes are bytes, times are seconds unless the name says otherwise."""

    model_config = SettingsConfigDict(env_prefix="SUBPAGE_", frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one and prints it.")

    store: str = Field(
        default_factory=lambda: default_store(dict(os.environ), Path.home()),
        description="Where machines are kept: sqlite:///path, postgresql://user:password@host/database, or memory.",
    )
    max_loaded_vms: int = Field(64, ge=1, description="Machines kept in memory while nobody uses them.")

    max_body_bytes: int = Field(GIB, ge=1, description="Largest body of a trace.")
    max_document_bytes: int = Field(32 * MIB, ge=1, description="Largest body of every other call.")
    spool_memory_bytes: int = Field(16 * MIB, ge=0, description="Spooled bodies larger than this go to a file.")
    spool_dir: Path | None = Field(None, description="Folder of spooled bodies; the system's own by default.")
    body_queue_bytes: int = Field(8 * MIB, ge=1, description="Bytes of one body that may wait for its replay.")

    max_vms: int = Field(64, ge=1, description="Machines that may exist at one time.")
    max_table_frames: int = Field(
        1 << 20, ge=16, description="4 KiB frames (tables, guest memory, bitmaps) one machine may use."
    )
    max_subpage_window: int = Field(1 << 20, ge=1, le=1 << 20, description="Pages one sub-page call may cover.")
    max_memory_window: int = Field(64 * MIB, ge=1, description="Bytes of guest memory one call may cover.")

    busy_timeout: float = Field(5.0, ge=0, description="How long a mutation waits for its machine before 409 vm-busy.")
    replay_threads: int = Field(32, ge=1, description="Replays that may be under way at one time, over all machines.")
    shutdown_timeout: int = Field(10, ge=0, description="Seconds that requests have to end when the service stops.")
    warm_up: bool = Field(True, description="Load the compiled kernels before /readyz answers 200.")

    page_size: int = Field(100, ge=1, description="Items in one page of a list when no limit is given.")
    max_page_size: int = Field(1000, ge=1, description="Largest limit of a list.")
    exit_page_size: int = Field(1000, ge=1, description="Exit records in one JSON page, and inlined in a trace result.")
    max_exit_records: int = Field(10_000_000, ge=0, description="Largest max_exit_records of one trace; its default.")
    kept_traces: int = Field(100, ge=1, description="Trace results kept per machine; the oldest go first.")
    kept_exit_records: int = Field(20_000_000, ge=0, description="Exit records kept per machine over all its traces.")
    kept_trace_days: float = Field(30, ge=0, description="Trace results older than this go; 0 keeps them.")
    loaded_exit_records: int = Field(
        2_000_000, ge=0, description="Exit records kept in memory per machine; the store has the others."
    )

    @field_validator("store")
    @classmethod
    def _known_store(cls, value: str) -> str:
        StoreUrl.parse(value)
        return value
