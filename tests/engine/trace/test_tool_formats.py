"""Every format of the table: a random trace that is written and read back, and what each says of itself."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest

from engine.arch import access as acc
from engine.errors import TraceError
from engine.trace.option_names import FORMATS as BODIES
from engine.trace.option_names import TOOL_FORMATS
from engine.trace.readers import open_trace
from engine.trace.readers.formats import FORMATS, recognised
from tests.support.tool_traces import WRITERS, random_accesses

SAMPLES = Path(__file__).parents[2] / "data" / "tools"
NAMES = sorted(FORMATS)


def columns(format: str, body: bytes, **options) -> dict[str, list[int]]:
    """The columns of all records, as numbers."""
    found: dict[str, list[int]] = {name: [] for name in ("gpa", "size", "access", "vcpu", "kind", "gva", "pc", "time")}
    for chunk in open_trace(format, io.BytesIO(body), **options):
        word = chunk.records[:, 1]
        found["gpa"] += chunk.records[:, 0].tolist()
        for name, shift, mask in (("size", 0, 0xFFFF), ("access", 16, 0xFF), ("vcpu", 32, 0xFFFF)):
            found[name] += (word >> np.uint64(shift) & np.uint64(mask)).tolist()
        found["kind"] += (word >> np.uint64(acc.RECORD_KIND_SHIFT) & np.uint64(7)).tolist()
        for name, values in (("gva", chunk.gva), ("pc", chunk.carry.get("pc")), ("time", chunk.carry.get("time"))):
            found[name] += [] if values is None else values.tolist()
    return found


def test_the_words_and_the_table_are_the_same() -> None:
    assert (*FORMATS, "auto") == TOOL_FORMATS
    assert not set(TOOL_FORMATS) & set(BODIES)
    assert set(WRITERS) == set(FORMATS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_a_random_trace_is_read_back(name: str, seed: int) -> None:
    written = WRITERS[name](random_accesses(seed, 60))
    found = columns(name, written.body)
    for column in set(FORMATS[name].columns) & set(found):
        assert found[column] == [record[column] for record in written.records], column


@pytest.mark.parametrize("name", NAMES)
def test_it_is_recognised(name: str) -> None:
    body = WRITERS[name](random_accesses(7, 20)).body
    assert recognised(body) is FORMATS[name]
    assert columns("auto", body) == columns(name, body)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("body", [*BODIES, "gpa8"])
def test_sent_as_another_body_it_is_noticed(name: str, body: str) -> None:
    options = {"record": "gpa8" if body == "gpa8" else "record16"} if body in ("packed", "gpa8") else {}
    if name == "champsim" and body == "packed":
        return  # 16 bytes are a record whatever they are
    trace = WRITERS[name](random_accesses(7, 20)).body
    with pytest.raises(TraceError, match=f"this looks like a {name} trace: send it as"):
        list(open_trace("packed" if body == "gpa8" else body, io.BytesIO(trace), **options))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_said_of_it_is_one_line(name: str) -> None:
    tool = FORMATS[name]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", name) and name == tool.name
    for words in (tool.tool, tool.made, tool.reads, tool.writes, tool.executes):
        assert words and "\n" not in words and "|" not in words.replace("\\|", "")


def test_the_sample_of_lackey() -> None:
    """w stores 64-bit words to table[], from 0x4a9000 on, with the instruction at 0x401624 (tests/data/README.md)."""
    body = (SAMPLES / "lackey.txt").read_bytes()
    found = columns("lackey", body)
    stores = [at for at, access in enumerate(found["access"]) if access == acc.WRITE]
    assert [found["gpa"][at] for at in stores] == [0x1FFF0005B8, *range(0x4A9000, 0x4A9000 + 8 * (len(stores) - 1), 8)]
    assert {found["pc"][at] for at in stores} == {0x4019B2, 0x401624}
    assert {found["size"][at] for at in stores} == {8}
    assert found["gpa"][:2] == [0x4019AD, 0x1FFF0005C8] and found["access"][:2] == [acc.EXECUTE, acc.READ]
    assert len(found["gpa"]) == len(body.splitlines()) - 6


def test_the_document_has_each_format() -> None:
    text = (Path(__file__).parents[3] / "docs" / "traces.md").read_text()
    assert [name for name in FORMATS if f"| `{name}` |" not in text] == []


def test_the_sample_of_champsim() -> None:
    """The same stores of w, by the same instruction; ChampSim has no sizes."""
    found = columns("auto", (SAMPLES / "champsim.trace").read_bytes())
    assert found["gpa"][:41] == [*range(0x4A9000, 0x4A9100, 8), *range(0x4A8000, 0x4A8080, 0x10), 0x4A9018]
    assert found["access"][:41] == [acc.WRITE] * 40 + [acc.READ]
    assert set(found["size"]) == {8} and found["pc"][:32] == [0x401624] * 32
