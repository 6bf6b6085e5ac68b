"""The same for asyncio: one implementation, awaited."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

import subpage
from subpage import AsyncClient


def test_the_main_job(server: Any, tmp_path: Any) -> None:
    async def job() -> None:
        async with AsyncClient(server.url) as client:
            vm = await client.create_vm("guest", memory="16MiB")
            await vm.protect([{"name": "table", "gpa": 0x8000, "size": 128}], name="p")
            bitmaps = await asyncio.gather(*(vm.subpages(gfn) for gfn in range(8, 16)))
            assert [bitmap[0] & 1 for bitmap in bitmaps] == [0] + [1] * 7
            path = tmp_path / "t.ndjson"
            path.write_text('{"gpa": 32768}\n' * 100)
            said: list[int] = []
            for source in (path, [{"gpa": 0x8000}] * 100):
                trace = await vm.replay(source, progress=lambda done, total: said.append(done))
                assert trace.violations == 100
                assert len([exit async for exit in trace.exits(limit=7)]) == 7
            assert (await trace.arrow(limit=3)).num_rows == 3 and said

            async def pieces() -> AsyncIterator[bytes]:
                yield b'{"gpa": 32768}\n'

            with pytest.raises(subpage.BadInput, match="say with media="):
                await vm.replay(pieces())
            assert (await vm.replay(pieces(), media="application/x-ndjson")).violations == 1
            assert (await (await vm.submit([{"gpa": 0x8000}])).wait()).violations == 1
            assert vm.id in [found.id async for found in client.vms()]
            with pytest.raises(subpage.NotFound):
                await client.vm("vm_0000000000000000")
            await vm.delete()

    asyncio.run(job())


def test_a_tool_answers_several_questions_at_once(server: Any) -> None:
    async def tool() -> None:
        met, both = 0, asyncio.Event()

        async def decide(question: subpage.Question) -> str:
            nonlocal met
            met += 1
            if met == 2:
                both.set()
            await asyncio.wait_for(both.wait(), 60)
            return "allow"

        async with AsyncClient(server.url) as client:
            vm = await client.create_vm("guest", memory="16MiB", vcpus=2)
            await vm.set_subpages(0x10, 0)
            async with vm.attach(decide, priority=3) as attached:
                asked = (vm.access(0x10000 + 8 * vcpu, vcpu=vcpu, on_violation="ask") for vcpu in range(2))
                outcomes = await asyncio.gather(*asked)
                assert attached.attached and attached.attached["priority"] == 3
            assert all(outcome["landed"] for outcome in outcomes)
            with pytest.raises(ValueError, match="a handler answers with one of"):
                async with vm.attach(lambda question: "perhaps"):
                    assert not (await vm.access(0x10000, on_violation="ask"))["landed"]
            await vm.delete()

    asyncio.run(tool())


def test_threads_answer_several_at_once(vm: subpage.Vm) -> None:
    vm.set_subpages(0x20, 0)
    together = threading.Barrier(2)

    def decide(question: subpage.Question) -> str:
        together.wait(60)
        return "allow"

    landed: list[bool] = []
    with vm.attach(decide) as tool:
        guests = [
            threading.Thread(target=lambda at=at: landed.append(vm.access(at, on_violation="ask")["landed"]))
            for at in (0x20000, 0x20008)
        ]
        for guest in guests:
            guest.start()
        for guest in guests:
            guest.join()
    assert landed == [True, True] and tool.answered == 2


def test_what_a_handler_raises_is_raised(vm: subpage.Vm) -> None:
    vm.set_subpages(0x20, 0)
    with pytest.raises(ZeroDivisionError), vm.attach(lambda question: str(1 // 0)):
        assert not vm.access(0x20000, on_violation="ask")["landed"]


def test_events_are_followed(vm: subpage.Vm) -> None:
    last = [event["id"] for event in vm.events()][-1]
    with vm.events(follow=True, after=last) as events:
        vm.access(0x10040)
        assert next(events)["kind"] == "violation"
        vm.set_subpages(0x11, 0)
        assert next(events)["kind"] == "subpages"


def test_a_wish_that_is_refused(vm: subpage.Vm) -> None:
    with pytest.raises(subpage.Problem) as refused:
        vm.attach(lambda question: "skip", priority=10_000)
    assert refused.value.field == "attach.priority"
