"""``subpage replay``: a trace against a policy in this process, with what the service does it with and no service."""

from __future__ import annotations

import json
import threading
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from engine.errors import EngineError
from engine.kvm.protections import ProtectedObject
from engine.machine import VirtualMachine
from engine.trace.results import TraceResult
from service.api.memory_slots import NumberedSlotRequest
from service.api.protections import ProtectionRequest
from service.api.subpages import SubpagePatch, SubpageRangeRequest, ranges_of
from service.api.traces import FORMATS, carried_columns, result_document
from service.api.vms import VmRequest
from service.demo import CONTENT_TYPES, report_of
from service.http.handlers import refusal
from service.http.words import Document
from service.problems import ServiceError
from service.runtime.job import Job
from service.runtime.registry import build
from service.runtime.spool import Spool
from service.runtime.traces import Trace, TraceRequest, replay
from service.settings import Settings

_GIB = 1 << 30
_PAGE = 4096
_LOOK_SECONDS = 0.1
# Members of an object that people keep in their policies, and that only they have a use for.
_OBJECT = ("name", "gpa", "size")


class LocalError(Exception):
    """What the command says and exits with."""


class Policy(Document):
    """What is created before the trace is replayed, in the service's own documents."""

    name: str = Field("", max_length=200)
    vm: VmRequest = Field(default_factory=lambda: VmRequest.model_validate({}))
    protections: list[ProtectionRequest] = Field(default_factory=list)
    subpages: list[SubpageRangeRequest] = Field(default_factory=list)

    @property
    def end(self) -> int:
        """The first address after everything that it names."""
        objects = [item.gpa + item.size for protection in self.protections for item in protection.objects]
        return max([0, *objects, *((item.gfn + item.npages) * _PAGE for item in self.subpages)])


def read_policy(path: Path) -> Policy:
    """The policy in a JSON or TOML file.

    ``{"vm", "protections", "subpages"}`` with members as the service takes them, or ``{"name", "objects"}`` as
    ``subpage demo`` does. SPP is enabled and there is RAM from address 0 unless ``vm`` says otherwise.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        if not isinstance(document, dict):
            raise ValueError("it must be an object")
        if "objects" in document:
            objects = [{name: item[name] for name in _OBJECT} for item in document["objects"]]
            name = str(document.get("name") or path.stem)
            document = {"name": name, "protections": [{"name": "policy", "objects": objects}]}
        if isinstance(document.setdefault("vm", {}), dict):
            document["vm"].setdefault("spp", True)
        policy = Policy.model_validate(document)
    except ValidationError as error:
        raise LocalError(f"{path}: {_said(refusal(error.errors()))}") from None
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise LocalError(f"{path}: {error!r}") from None
    vm = policy.vm
    if "memory_slots" not in vm.model_fields_set:
        ram = NumberedSlotRequest(slot=0, gpa=0, size=max(_GIB, -(-policy.end // _PAGE) * _PAGE))
        vm = vm.model_copy(update={"memory_slots": [ram]})
    return policy.model_copy(update={"vm": vm, "name": policy.name or vm.name or path.stem})


def create(policy: Policy) -> VirtualMachine:
    """The machine that a policy describes. Raises LocalError."""
    settings = Settings()
    try:
        slots = [slot.spec(slot.slot) for slot in policy.vm.memory_slots]
        machine = build(policy.vm.config(settings.max_table_frames), slots, spp=policy.vm.spp)
        for protection in policy.protections:
            objects = [ProtectedObject(item.name, item.gpa, item.size) for item in protection.objects]
            machine.protect(protection.name, objects)
        if policy.subpages:
            machine.set_subpages(ranges_of(SubpagePatch(ranges=policy.subpages), settings.max_subpage_window))
    except (EngineError, ServiceError) as error:
        raise LocalError(f"{policy.name}: {_said(error)}") from None
    return machine


@dataclass(frozen=True, slots=True)
class Options:
    """Those of the call, under the names of its parameters; ``format`` is known by the name of the file otherwise."""

    format: str | None = None
    record: str = "record16"
    on_violation: str = "skip"
    start: int = 0
    include: str = "violations"
    carry: str | None = None
    max_exit_records: int | None = None

    def request(self, path: Path) -> TraceRequest:
        """Raises LocalError."""
        kind = self.format or FORMATS.get(CONTENT_TYPES.get(path.suffix, ""))
        if kind is None:
            raise LocalError(f"{path}: say --format, or end the name in one of {', '.join(CONTENT_TYPES)}")
        kept = Settings().max_exit_records if self.max_exit_records is None else self.max_exit_records
        try:
            carry = carried_columns(self.carry)
        except ServiceError as error:
            raise LocalError(_said(error)) from None
        record = self.record if kind == "packed" else None
        return TraceRequest(kind, record, carry, self.on_violation, self.include, self.start, kept)


Watcher = Callable[[Job], None]


def run(path: Path, machine: VirtualMachine, request: TraceRequest, watch: Watcher = lambda job: None) -> Trace:
    """Replay a file on ``machine``. ``watch`` is called now and then with how far it is, and once at the end.

    Raises LocalError. An interruption from the keyboard leaves the machine as it was and is raised again.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise LocalError(f"{path}: {error.strerror}") from None
    with file:
        job = Job(1, "local", "local", "local", datetime.now(UTC), wanted=request)
        job.spool = Spool(file, path.stat().st_size)
        memory = Settings().body_memory_bytes
        done: list[tuple[TraceResult, tuple[str, ...]]] = []
        failed: list[Exception] = []

        def work() -> None:
            try:
                done.append(replay(machine, request, job.source(memory), job.check, job.follow, memory))
            except Exception as error:  # noqa: BLE001 - raised below
                failed.append(error)

        thread = threading.Thread(target=work, name="replay")
        began = time.perf_counter()
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
        seconds = time.perf_counter() - began
    if failed:
        if isinstance(failed[0], (EngineError, ServiceError)):
            raise LocalError(f"{path}: {_said(failed[0])}")
        raise failed[0]
    result, ignored = done[0]
    return Trace("tr_local", 1, request, result, ignored, datetime.now(UTC), seconds, len(result.exit_columns))


def document_of(trace: Trace, exits: int) -> dict[str, Any]:
    """The result as the service answers it, with the first ``exits`` exit records; there is no URL of others."""
    return {**result_document("local", trace, exits), "next": None}


def report(path: Path, policy: Policy, machine: VirtualMachine, trace: Trace) -> dict[str, Any]:
    """What ``service.report`` prints."""
    covered = {
        "pages": sum(protection.pages for protection in machine.protections()),
        "subpages": sum(protection.subpages for protection in machine.protections()),
    }
    memory = sum(slot.size for slot in policy.vm.memory_slots)
    return report_of(str(path), policy.name, memory, covered, document_of(trace, 3), trace.seconds)


def _said(error: Exception) -> str:
    """A refusal in one line, as a problem's detail has it."""
    members: Mapping[str, Any] = {name: getattr(error, name, None) for name in ("field", "value", "index")}
    text = getattr(error, "rule", str(error))
    if members["field"] is not None:
        text = f"{members['field']}: {text}"
    if members["value"] is not None:
        text += f" (got {members['value']})"
    return f"record {members['index']}: {text}" if members["index"] is not None else text
