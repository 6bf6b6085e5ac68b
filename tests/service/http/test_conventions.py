"""Numbers, media types, cursors, entity tags."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request

from engine.errors import Busy
from service.http import bitmaps, conditional, cursors, negotiation
from service.http.wire_types import Access, Hex32, Hex64
from service.problems import InvalidDocument, PreconditionFailed, PreconditionRequired
from service.runtime.vm_lock import VmLock
from service.settings import Settings

HEX64 = TypeAdapter[int](Hex64)
HEX32 = TypeAdapter[int](Hex32)
ACCESS = TypeAdapter[int](Access)


def request(**headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "GET", "path": "/", "headers": raw})


@pytest.mark.parametrize(
    ("given", "number"),
    [(0, 0), ("0", 0), ("0x0", 0), ("0xFf", 255), ("10", 10), ("0010", 10), ((1 << 64) - 1, (1 << 64) - 1)],
)
def test_words_in(given: Any, number: int) -> None:
    assert HEX64.validate_python(given) == number


@pytest.mark.parametrize(
    "given",
    [
        True,
        1.0,
        None,
        "",
        "0x",
        "x",
        "-1",
        "+1",
        " 1",
        "1 ",
        "1_0",
        "0X1",
        "0b1",
        "1e3",
        "٣",
        -1,
        1 << 64,
        "0x1" + "0" * 16,
        "9" * 5000,
        b"1",
        [],
        {},
    ],
)
def test_words_refused(given: Any) -> None:
    with pytest.raises(ValidationError):
        HEX64.validate_python(given)


def test_words_out() -> None:
    assert HEX64.dump_json(255) == b'"0xff"' and HEX64.dump_python(255) == 255
    assert HEX32.validate_python("0xffffffff") == 0xFFFFFFFF
    with pytest.raises(ValidationError):
        HEX32.validate_python(1 << 32)


@pytest.mark.parametrize(("given", "number"), [("read", 0), ("write", 1), ("execute", 2), (0, 0), ("2", 2)])
def test_access(given: Any, number: int) -> None:
    assert ACCESS.validate_python(given) == number


@pytest.mark.parametrize("given", [3, -1, True, "3", "Write", None])
def test_access_refused(given: Any) -> None:
    with pytest.raises(ValidationError):
        ACCESS.validate_python(given)


def test_many_words() -> None:
    assert bitmaps.words32([1, "0x2", "3"], "access").tolist() == [1, 2, 3]
    assert bitmaps.window_json(2, np.array([1, 0xFFFFFFFF], dtype=np.uint32)) == (
        b'{"gfn":"0x2","npages":2,"access":["0x1","0xffffffff"]}'
    )
    with pytest.raises(InvalidDocument) as caught:
        bitmaps.words32([1, "0x100000000"], "access")
    assert caught.value.field == "access[1]"


def test_cursors() -> None:
    for position in (0, 1, 1 << 40):
        assert cursors.decode("vms", cursors.encode("vms", position)) == position
    with pytest.raises(InvalidDocument):
        cursors.decode("traces", cursors.encode("vms", 1))
    assert cursors.next_url("/x", "vms", 5, None).startswith("/x?cursor=")
    assert cursors.next_url("/x", "vms", 5, 3).endswith("&limit=3")


OFFERS = ("application/json", "application/octet-stream")


@pytest.mark.parametrize(
    ("accept", "best"),
    [
        ("", None),
        ("text/html", None),
        ("application/json;q=x", None),
        ("application/octet-stream;q=0.9, application/json;q=0.8", OFFERS[1]),
        ("application/*;q=0.3, application/octet-stream;q=0.2", OFFERS[0]),
        ("*/*;q=0.1, application/json;q=0", OFFERS[1]),
        ("APPLICATION/JSON", OFFERS[0]),
        ("application/json; charset=utf-8; q=0.4", OFFERS[0]),
        ("application/json;q=7", OFFERS[0]),
        (",,application/json,", OFFERS[0]),
    ],
)
def test_accept(accept: str, best: str | None) -> None:
    assert negotiation._preferred(accept, OFFERS) == best


def test_no_accept_means_the_first_offer() -> None:
    assert negotiation.preferred(request(), OFFERS) == OFFERS[0]


def test_tags_are_of_content() -> None:
    assert conditional.entity_tag(b"a") == conditional.entity_tag(b"a") != conditional.entity_tag(b"b")
    assert conditional.entity_tag(b"a", b"b") != conditional.entity_tag(b"ab")


def test_not_modified() -> None:
    for header, expected in (
        ('"a"', True),
        ('W/"a"', True),
        ('"b", "a"', True),
        ("*", True),
        ('"b"', False),
        ("a", False),
    ):
        assert conditional.not_modified(request(if_none_match=header), '"a"') is expected
    assert not conditional.not_modified(request(), '"a"')


def test_require_match() -> None:
    def never() -> list[str]:
        raise AssertionError

    conditional.require_match(request(), never, required=False)
    with pytest.raises(PreconditionRequired):
        conditional.require_match(request(), never, required=True)
    for header in ('"a"', "*", '"b", "a"'):
        conditional.require_match(request(if_match=header), lambda: ['"a"'], required=True)
    for header, tags in (('"b"', ['"a"']), ('W/"a"', ['"a"']), ("*", []), ("a", ['"a"'])):
        with pytest.raises(PreconditionFailed):
            conditional.require_match(request(if_match=header), lambda tags=tags: tags, required=False)
    conditional.require_match(request(if_none_match="*"), list, required=True)
    conditional.require_match(request(if_none_match='"b"'), lambda: ['"a"'], required=False)
    for header in ("*", '"a"'):
        with pytest.raises(PreconditionFailed):
            conditional.require_match(request(if_none_match=header), lambda: ['"a"'], required=False)


def test_writers_take_turns() -> None:
    order: list[int] = []

    async def run() -> None:
        lock = VmLock(5)

        async def work(number: int) -> None:
            async with lock.hold():
                await asyncio.sleep(0)
                order.append(number)

        await asyncio.gather(*(work(number) for number in range(5)))

    asyncio.run(run())
    assert order == list(range(5))


def test_a_writer_gives_up_waiting() -> None:
    async def run() -> None:
        lock = VmLock(0.01)
        async with lock.hold():
            with pytest.raises(Busy):
                async with lock.hold():
                    pass
        async with lock.hold():
            pass

    asyncio.run(run())


def test_every_setting_is_described() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBPAGE_MAX_VMS", "3")
    monkeypatch.setenv("SUBPAGE_KERNEL_CACHE", "/nowhere")
    assert Settings().max_vms == 3
    monkeypatch.setenv("SUBPAGE_PORT", "70000")
    with pytest.raises(ValidationError):
        Settings()
