"""What a type checker makes of the client; `make lint` has mypy read it, nothing runs it."""

from __future__ import annotations

from typing import assert_type

from subpage import (
    AsyncClient,
    AsyncStream,
    AsyncTrace,
    AsyncVm,
    Bitmap,
    Client,
    Document,
    Job,
    Stream,
    Trace,
    Vm,
)


def blocking(client: Client) -> None:
    """Methods return what they have."""
    vm = client.create_vm("guest", memory="1GiB")
    assert_type(vm, Vm)
    assert_type(client.vms(), Stream[Vm])
    assert_type(vm.subpages(1), Bitmap)
    assert_type(vm.replay("boot.parquet", start=3), Trace)
    assert_type(vm.submit(b""), Job)
    assert_type(client.job("job_1").wait(), Trace)
    assert_type(vm.events(follow=True), Stream[Document])
    vm.subpages("1")  # type: ignore[arg-type]
    vm.subpages(1, nonsense=2)  # type: ignore[call-arg]


async def awaiting(client: AsyncClient) -> None:
    """Methods are awaited."""
    vm = await client.create_vm("guest", memory="1GiB")
    assert_type(vm, AsyncVm)
    assert_type(client.vms(), AsyncStream[AsyncVm])
    assert_type(await vm.subpages(1), Bitmap)
    assert_type(await vm.replay("boot.parquet"), AsyncTrace)
    assert_type(await (await client.job("job_1")).wait(), AsyncTrace)
