"""``subpage replay``: a trace against a policy in this process, with what the service does it with and no service."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from engine.errors import EngineError
from engine.machine import VirtualMachine
from engine.trace.compressed import compression_of
from engine.trace.readers import Source
from engine.trace.results import TraceResult
from service.api.machines.vms import VmRequest
from service.api.memory.memory_slots import NumberedSlotRequest
from service.api.protection.policies import ProtectionRequest
from service.api.protection.subpages import SubpagePatch, SubpageRangeRequest, ranges_of
from service.api.traces.traces import carried_columns, result_document
from service.cli.demo import report_of
from service.cli.policy_files import checked, policy_document, policy_of
from service.cli.trace_files import look
from service.http.handlers import refusal
from service.http.wire_types import Document
from service.platform.failures import Failure, opened
from service.problems import ServiceError, said
from service.runtime.job import Job
from service.runtime.registry import build
from service.runtime.spool import Spool
from service.runtime.trace_files import AUTO, fault_in, look_in, unpacked
from service.runtime.traces import Trace, TraceRequest, replay
from service.settings import Settings

_GIB = 1 << 30
_PAGE = 4096
_LOOK_SECONDS = 0.1


class LocalError(Failure):
    """The replay cannot be done, or ended in a refusal."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The settings that bound a machine and a replay on it, without the others, some of which are secrets."""

    max_table_frames: int
    max_subpage_window: int
    max_exit_records: int
    body_memory_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> Bounds:
        return cls(*(getattr(settings, field.name) for field in fields(cls)))


class Policy(Document):
    """What is created before the trace is replayed, in the service's own documents."""

    name: str = Field("", max_length=200)
    vm: VmRequest = Field(default_factory=lambda: VmRequest.model_validate({}))
    protections: list[ProtectionRequest] = Field(default_factory=list)
    subpages: list[SubpageRangeRequest] = Field(default_factory=list)

    @property
    def end(self) -> int:
        """The first address after everything that it names."""
        protected = (item.protection().end for item in self.protections)
        return max([0, *protected, *((item.gfn + item.npages) * _PAGE for item in self.subpages)])


def read_policy(path: Path) -> Policy:
    """The policy in a JSON or TOML file.

    The form of ``service.api.protection.policies``, or ``{"vm", "protections", "subpages"}`` with members as the
    service takes them. SPP is enabled and there is RAM from address 0 unless ``vm`` says otherwise. Raises Failure.
    """
    try:
        document = policy_document(path)
        if "objects" in document or "pages" in document:
            protection = policy_of(path, document)
            policy = _in_vm({"name": protection.name}).model_copy(update={"protections": [protection]})
        else:
            policy = _in_vm(document)
            for position, item in enumerate(policy.protections):
                checked(item, f"protections[{position}].")
    except ValidationError as error:
        raise LocalError(f"{path}: {said(refusal(error.errors(), Policy))}") from None
    except (EngineError, ServiceError) as error:
        raise LocalError(f"{path}: {said(error)}") from None
    vm = policy.vm
    if "memory_slots" not in vm.model_fields_set:
        ram = NumberedSlotRequest(slot=0, gpa=0, size=max(_GIB, -(-policy.end // _PAGE) * _PAGE))
        vm = vm.model_copy(update={"memory_slots": [ram]})
    return policy.model_copy(update={"vm": vm, "name": policy.name or vm.name or path.stem})


def _in_vm(document: dict[str, Any]) -> Policy:
    """``document`` in the service's own members, with SPP unless it says otherwise. Raises ValidationError."""
    vm = document.get("vm", {})
    return Policy.model_validate({**document, "vm": {"spp": True, **vm} if isinstance(vm, dict) else vm})


def create(policy: Policy, settings: Settings | Bounds) -> VirtualMachine:
    """The machine that a policy describes. Raises LocalError."""
    try:
        slots = [slot.spec(slot.slot) for slot in policy.vm.memory_slots]
        machine = build(policy.vm.config(settings.max_table_frames), slots, spp=policy.vm.spp)
        for item in policy.protections:
            wanted = item.protection()
            machine.protect(wanted.name, wanted.objects, wanted.ranges, wanted.about)
        if policy.subpages:
            _set(machine, policy.subpages, settings)
    except (EngineError, ServiceError) as error:
        raise LocalError(f"{policy.name}: {said(error)}") from None
    return machine


def _set(machine: VirtualMachine, ranges: Sequence[SubpageRangeRequest], settings: Settings | Bounds) -> None:
    """SET them. The call of the service has them under another name."""
    try:
        machine.set_subpages(ranges_of(SubpagePatch(ranges=list(ranges)), settings.max_subpage_window))
    except (EngineError, ServiceError) as error:
        error.field = (error.field or "").replace("ranges", "subpages", 1)
        raise


@dataclass(frozen=True, slots=True)
class Options:
    """Those of the call, under the names of its parameters."""

    format: str = AUTO
    record: str = "record16"
    on_violation: str = "skip"
    start: int = 0
    include: str = "violations"
    carry: str | None = None
    max_exit_records: int | None = None
    columns: str | None = None
    skip_unknown: bool = False
    address: str = "gpa"

    def request(self, path: Path, settings: Settings | Bounds) -> TraceRequest:
        """What is asked for, of a file whose format it is or is found out. Raises Failure."""
        return self.request_of(look(path, self.format, self.columns), settings)

    def request_in(self, raw: Any, name: str, settings: Settings | Bounds) -> TraceRequest:
        """The same of a file that is open. Raises Failure."""
        return self.request_of(look_in(raw, name, self.format, self.columns), settings)

    def request_of(self, kind: str, settings: Settings | Bounds) -> TraceRequest:
        """The same of a file of this format. Raises Failure."""
        kept = settings.max_exit_records if self.max_exit_records is None else self.max_exit_records
        try:
            carry = carried_columns(self.carry)
        except ServiceError as error:
            raise LocalError(said(error)) from None
        record = self.record if kind == "packed" else None
        return TraceRequest(
            kind,
            record,
            carry,
            self.on_violation,
            self.include,
            self.start,
            kept,
            skip_unknown=self.skip_unknown,
            columns=self.columns,
            address=self.address,
        )


Watcher = Callable[[Job], object]
T = TypeVar("T")


def run(path: Path, machine: VirtualMachine, request: TraceRequest, watch: Watcher = lambda job: None) -> Trace:
    """Replay a file on ``machine``, a compressed one as what is in it.

    ``watch`` is called now and then with how far it is, and once at the end. Raises Failure. An interruption from the
    keyboard leaves the machine as it was and is raised again.
    """
    with opened(path) as file:
        return run_in(file, path.stat().st_size, path, machine, request, Settings().body_memory_bytes, watch)


def run_in(
    file: Any,
    size: int,
    name: Path | str,
    machine: VirtualMachine,
    request: TraceRequest,
    memory: int,
    watch: Watcher = lambda job: None,
) -> Trace:
    """The same of a file that is open, whose body may take ``memory``."""
    compression = compression_of(file.read(8))
    file.seek(0)
    job = Job(1, "local", "local", "local", datetime.now(UTC), wanted=request)
    job.spool = Spool(file, size)

    def work() -> tuple[TraceResult, tuple[str, ...]]:
        source: Source = job.source(memory)
        if compression is not None:
            job.total, source = None, unpacked(name, source, compression)
        return replay(machine, request, source, job.check, job.follow, memory)

    began = time.perf_counter()
    try:
        result, ignored = _watched(job, work, watch)
    except (EngineError, ServiceError) as error:
        raise fault_in(name, error) from None
    seconds = time.perf_counter() - began
    return Trace("tr_local", 1, request, result, ignored, datetime.now(UTC), seconds, len(result.exit_columns))


def _watched(job: Job, work: Callable[[], T], watch: Watcher) -> T:
    """What a thread works out, which is told when nobody wants that any more."""
    done: list[T] = []
    failed: list[Exception] = []

    def caught() -> None:
        try:
            done.append(work())
        except Exception as error:  # noqa: BLE001 - raised below
            failed.append(error)

    thread = threading.Thread(target=caught, name="replay")
    job.begin()
    thread.start()
    try:
        looked = False
        while not looked or thread.is_alive():
            thread.join(_LOOK_SECONDS)
            watch(job)
            looked = True
    except KeyboardInterrupt:
        job.stop("cancelled")
        thread.join()
        raise
    if failed:
        raise failed[0]
    return done[0]


def document_of(trace: Trace, exits: int) -> dict[str, Any]:
    """The result as the service answers it, with the first ``exits`` exit records; there is no URL of others."""
    return {**result_document("local", trace, exits), "next": None}


def report(path: Path, policy: Policy, machine: VirtualMachine, trace: Trace) -> dict[str, Any]:
    """What ``service.cli.report`` prints."""
    covered = {
        "pages": sum(protection.pages for protection in machine.protections()),
        "subpages": sum(protection.subpages for protection in machine.protections()),
    }
    memory = sum(slot.size for slot in policy.vm.memory_slots)
    return report_of(str(path), policy.name, memory, covered, document_of(trace, 3), trace.seconds)
