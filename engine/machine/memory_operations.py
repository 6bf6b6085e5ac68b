"""Contents of a machine's guest memory, read and written from the host's side: no permission applies."""

from __future__ import annotations

from engine.errors import InvalidValue
from engine.kvm import dirty_marking, page_contents
from engine.kvm.memory_views import store_bytes
from engine.kvm.slots import check_pages
from engine.machine.state import Operations, State
from engine.state.frame_store import Draft
from engine.state.retry import run_all

_LOGGED_AT_ONCE = 1 << 16


class Memory(Operations):
    """Guest memory of one machine. A page without a slot raises InvalidValue."""

    def read(self, gpa: int, size: int) -> bytes:
        """Guest RAM contents, zero where nothing was written."""
        now = self._state.current
        _check(now, gpa, size, "size")
        return page_contents.read_bytes(now.snapshot.machine, gpa, size)

    def write(self, gpa: int, data: bytes) -> None:
        """Store bytes; the dirty logs are told."""
        now = self._state.current
        _check(now, gpa, len(data), "body")
        with self._state.change(since=now) as change:
            store_bytes(change, gpa, data)
            _log(change, gpa, len(data))


def _log(draft: Draft, gpa: int, size: int) -> None:
    def note(done: int) -> int:
        begin = done * _LOGGED_AT_ONCE
        dirty_marking.note_host_write(draft.machine, gpa + begin, min(_LOGGED_AT_ONCE, size - begin))
        return done + 1

    run_all(draft, -(-size // _LOGGED_AT_ONCE), note)


def _check(now: State, gpa: int, size: int, field: str) -> None:
    if size < 1:
        raise InvalidValue("at least one byte is asked for", field=field, value=size)
    if gpa < 0:
        raise InvalidValue("an address is not negative", field="gpa", value=gpa)
    pages = ((gpa + size - 1) >> 12) - (gpa >> 12) + 1
    check_pages(now.snapshot.machine, now.config.maxphyaddr, gpa >> 12, pages, "gpa", gpa)
