"""kill -9 of the service, and another one on its port: events and tools go on where they were."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import subpage
from subpage import Client
from tests.support.processes import free_port, served
from tests.support.waiting import until


def test_events_and_tools_outlive_the_service(tmp_path: Path) -> None:
    port, store = free_port(), f"sqlite:///{tmp_path / 'subpage.db'}"
    asked: list[int] = []

    def decide(question: subpage.Question) -> str:
        asked.append(question.gpa)
        return "allow"

    with Client(f"http://127.0.0.1:{port}", patience=120) as client, contextlib.ExitStack() as stack:
        with served(port, store) as first:
            vm = client.create_vm("guest", memory="16MiB")
            vm.set_subpages(0x10, 0)
            events = stack.enter_context(vm.events(follow=True, kinds="violation"))
            tool = stack.enter_context(vm.attach(decide))
            assert vm.access(0x10000, on_violation="ask")["landed"]
            seen, before = [next(events)], tool.attached
            first.kill()
            first.wait()
        # The guest goes on meanwhile: its next access is tried until the service is back.
        outcome: list[subpage.Document] = []
        guest = threading.Thread(target=lambda: outcome.append(vm.access(0x10008, on_violation="skip")))
        guest.start()
        with served(port, store):
            guest.join()
            until(lambda: tool.attached is not before)
            assert vm.access(0x10010, on_violation="ask")["landed"]
            seen += [next(events), next(events)]
            vm.delete()
            assert list(events) == [] and tool.wait(60)
    assert [event["detail"]["gpa"] for event in seen] == ["0x10000", "0x10008", "0x10010"]
    assert len({event["id"] for event in seen}) == 3 and outcome[0]["landed"] is False
    assert asked == [0x10000, 0x10010] and not tool.errors
