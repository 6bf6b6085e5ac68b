"""What is read of the memory of a guest that is watched: the file that QEMU shares, behind the slots of the machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capture.qemu import Guest

if TYPE_CHECKING:
    import subpage

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EMPTY = "the machine's memory is empty"


def files_of(guest: Guest) -> list[str]:
    """The files that have the guest's RAM."""
    return list(dict.fromkeys(backing.path for backing in guest.backing if backing.path is not None))


def look(file: str) -> os.stat_result:
    """Size and time of a file as it is here."""
    return Path(file).stat()


def make_machine(client: subpage.Client, guest: Guest, document: dict[str, Any]) -> tuple[subpage.Vm, list[str]]:
    """A machine with slots like the guest's RAM, and lines that say what its memory is. Raises subpage.Error.

    A service that may not read the files, or has others by these names, gets a machine without them.
    """
    import subpage

    files = files_of(guest)
    missing = list(dict.fromkeys(each.rule for each in guest.backing if each.path is None))
    told = [f"{_EMPTY if not files else 'part of ' + _EMPTY}: {rule}" for rule in missing]
    refused = None
    if files:
        before = {file: look(file) for file in files}
        try:
            vm = _created(client, document, _slots(guest, with_files=True))
        except subpage.Problem as problem:
            refused = problem.detail
        else:
            if _are_ours(vm.slots(), before):
                return vm, [f"the machine's memory is the guest's as it is now: {', '.join(files)}", *told]
            vm.delete()
            refused = "the service has another file by that name"
        allow = ", ".join(f'"{file}"' for file in files)
        told = [f"{_EMPTY}: {refused}; SUBPAGE_MEMORY_FILES='[{allow}]' of a service here has it read"]
    return _created(client, document, _slots(guest, with_files=False)), told


def _created(client: subpage.Client, document: dict[str, Any], slots: list[dict[str, Any]]) -> subpage.Vm:
    return client.vm(client.call("createVm", json={**document, "memory_slots": slots}).json()["id"])


def _slots(guest: Guest, *, with_files: bool) -> list[dict[str, Any]]:
    slots: list[dict[str, Any]] = [
        {"slot": n, "gpa": hex(first), "size": hex(size)} for n, (first, size) in enumerate(guest.ranges)
    ]
    if with_files:
        for slot, backing in zip(slots, guest.backing, strict=True):
            if backing.path is not None:
                slot["backing"] = {"file": backing.path, "offset": hex(backing.offset)}
    return slots


def _are_ours(slots: Sequence[Any], before: dict[str, os.stat_result]) -> bool:
    """Whether the files that a service opened are those that are here: it may run elsewhere."""
    for backing in (slot["backing"] for slot in slots if slot["backing"] is not None):
        first, now = before[backing["file"]], look(backing["file"])
        written = (datetime.fromisoformat(backing["modified"]) - _EPOCH) // timedelta(microseconds=1)
        if backing["size"] != now.st_size or not first.st_mtime_ns // 1000 <= written <= now.st_mtime_ns // 1000:
            return False
    return True
