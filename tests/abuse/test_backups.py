"""Backups that were tampered with and have right checksums: each is refused with a sentence, and nothing restored."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.backups import offline
from service.backups.files import FORMAT, MAGIC, BadBackup, read_backup
from service.storage.columns import pack, unpack
from service.storage.urls import StoreUrl
from tests.support.http import new_vm, set_map
from tests.support.stores import serving

Sections = list[tuple[str, bytes]]
Tampering = Callable[[Sections], Sections]
_HUGE = 1 << 70


def packed(sections: Sections, version: int = FORMAT) -> bytes:
    whole = MAGIC + version.to_bytes(4, "little")
    for kind, data in sections:
        framed = struct.pack("<BI", ord(kind), len(data)) + data
        whole += framed + zlib.crc32(framed).to_bytes(4, "little")
    return whole


def unpacked(content: bytes) -> Sections:
    found, at = [], len(MAGIC) + 4
    while at < len(content):
        kind, length = struct.unpack_from("<BI", content, at)
        found.append((chr(kind), content[at + 5 : at + 5 + length]))
        at += 5 + length + 4
    return found


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Sections:
    """Two machines; the first has blocks, a result with exit records and objects, and a log."""
    folder = tmp_path_factory.mktemp("good")
    url = f"sqlite:///{folder}/store.db"
    with serving(url) as service:
        vm, other = new_vm(service.client), new_vm(service.client)
        objects = [{"name": "o", "gpa": 0x1000, "size": 64}, {"name": "p", "gpa": 0x1020, "size": 64}]
        assert service.client.post(f"{vm}/protections", json={"name": "p", "objects": objects}).status_code == 201
        accesses = [{"gpa": 0x1000}, {"gpa": 0x1020}, {"gpa": 0x2000}]
        assert service.client.post(f"{vm}/traces", json={"accesses": accesses}).json()["violations"] == 2
        assert set_map(service.client, other, 1, 0) == 204
    assert offline.backup(StoreUrl.parse(url), folder / "file", None) == 2
    sections = unpacked((folder / "file").read_bytes())
    assert {"V", "B", "T", "I", "P", "L", "E"} == {kind for kind, _ in sections}
    return sections


def each(kind: str, change: Callable[[bytes], bytes], number: int = 0) -> Tampering:
    """The ``number``-th section of a kind, changed."""

    def tampered(sections: Sections) -> Sections:
        places = [at for at, (name, _) in enumerate(sections) if name == kind]
        changed = list(sections)
        changed[places[number]] = (kind, change(sections[places[number]][1]))
        return changed

    return tampered


def member(kind: str, name: str, value: Any, number: int = 0) -> Tampering:
    """A member of a JSON section, set. ``head.x`` is x of the JSON within; ``events.x`` is x of the first row."""

    def change(data: bytes) -> bytes:
        document = json.loads(data)
        target, _, inner = name.rpartition(".")
        if target == "head":
            head = json.loads(document["head"])
            head[inner] = value
            document["head"] = json.dumps(head)
        else:
            (document[0] if target == "events" else document)[inner or name] = value
        return json.dumps(document).encode()

    return each(kind, change, number)


def without(kind: str, name: str) -> Tampering:
    def change(data: bytes) -> bytes:
        document = json.loads(data)
        del document[name]
        return json.dumps(document).encode()

    return each(kind, change)


def column(kind: str, name: str, place: int, value: Any) -> Tampering:
    """A claim in the header of a section of columns: 1 dtype, 2 shape, 3 bytes, 4 bytes as stored."""

    def change(data: bytes) -> bytes:
        end = 4 + int.from_bytes(data[:4], "little")
        header = json.loads(data[4:end])
        [row] = [row for row in header if row[0] == name]
        row[place] = value
        text = json.dumps(header).encode()
        return len(text).to_bytes(4, "little") + text + data[end:]

    return each(kind, change)


def values(kind: str, name: str, change: Callable[[Any], Any]) -> Tampering:
    """The numbers of a column, changed and packed anew."""

    def repacked(data: bytes) -> bytes:
        columns = unpack(data)
        columns[name] = change(columns[name])
        return pack(columns)

    return each(kind, repacked)


def drop(kind: str, number: int = 0) -> Tampering:
    def tampered(sections: Sections) -> Sections:
        places = [at for at, (name, _) in enumerate(sections) if name == kind]
        return [section for at, section in enumerate(sections) if at != places[number]]

    return tampered


def twice(kind: str) -> Tampering:
    return lambda sections: [item for section in sections for item in [section] * (1 + (section[0] == kind))]


def renamed(sections: Sections) -> Sections:
    """The second machine has the id of the first."""
    first = json.loads(next(data for kind, data in sections if kind == "V"))["id"]
    return member("V", "id", first, 1)(sections)


# What was done, and a word of the sentence that refuses it.
TAMPERINGS: dict[str, tuple[Tampering, str]] = {
    "machine: no JSON": (each("V", lambda _: b"{"), "section V"),
    "machine: a list": (each("V", lambda _: b"[]"), "section V"),
    "machine: null": (each("V", lambda _: b"null"), "section V"),
    "machine: no UTF-8": (each("V", lambda _: b"\xff\xfe"), "section V"),
    "head: nested deeply": (member("V", "head", "[" * 100_000), "nested too deeply"),
    "machine: nested deeply": (each("V", lambda _: b"[" * 100_000), "section V"),
    "machine: one member more": (member("V", "extra", 1), "extra"),
    "machine: one member less": (without("V", "created"), "created"),
    "machine: id with ../": (member("V", "id", "../../etc/passwd"), "id"),
    "machine: id with a quote": (member("V", "id", 'vm_"; DROP TABLE vms'), "id"),
    "machine: id a number": (member("V", "id", 7), "id"),
    "machine: id with a newline": (member("V", "id", "vm_0123456789abcdef\n"), "id"),
    "machine: number below 0": (member("V", "number", -1), "number"),
    "machine: number a truth": (member("V", "number", True), "number"),
    "machine: revision below 0": (member("V", "revision", -5), "revision"),
    "machine: revision 2^70": (member("V", "revision", _HUGE), "revision"),
    "machine: next_event 0": (member("V", "next_event", 0), "next_event"),
    "machine: next_event 2^63": (member("V", "next_event", 1 << 63), "next_event"),
    "machine: next_event too small": (member("V", "next_event", 1), "next_event"),
    "machine: created no time": (member("V", "created", "yesterday"), "created"),
    "machine: created without offset": (member("V", "created", "2026-11-29T12:00:00"), "created"),
    "machine: tenant of no such name": (member("V", "tenant", "No Such!"), "tenant"),
    "machine: tenant empty": (member("V", "tenant", ""), "tenant"),
    "machine: head no JSON": (member("V", "head", "{"), "head"),
    "machine: head a list": (member("V", "head", "[]"), "head"),
    "machine: twice": (renamed, "twice"),
    "head: another format": (member("V", "head.format", 99), "format"),
    "head: frames 2^70": (member("V", "head.frames", _HUGE), "frames"),
    "head: frames of 200 GiB": (member("V", "head.frames", 50 << 20), "frames"),
    "head: frames below 0": (member("V", "head.frames", -1), "frames"),
    "head: frames too few": (member("V", "head.frames", 1), "frames"),
    "head: slots no list": (member("V", "head.slots", 5), "cannot be read"),
    "head: a slot below 0": (member("V", "head.slots", [[-1, 0, 1 << 24, 0, 0]]), "cannot be read"),
    "head: a slot too many": (member("V", "head.slots", [[0, 0, 1 << 24], [1, 0, 1 << 24]]), "cannot be read"),
    "head: no configuration": (member("V", "head.config", {}), "cannot be read"),
    "head: protections of numbers": (member("V", "head.protections", [1]), "cannot be read"),
    "head: nested a text": (member("V", "head.nested", "x"), "cannot be read"),
    "head: outline a number": (member("V", "head.outline", 3), "cannot be read"),
    "head: a member that no machine has": (member("V", "head.extra", 3), "head.extra"),
    "blocks: missing": (drop("B"), "cannot be read"),
    "blocks: twice": (twice("B"), "twice"),
    "blocks: no columns": (each("B", lambda _: b""), "section B"),
    "blocks: header beyond the data": (each("B", lambda data: b"\xff" * 4 + data[4:]), "section B"),
    "blocks: 200 GiB": (column("B", "data", 3, 200 << 30), "section B"),
    "blocks: shape and bytes of 200 GiB": (
        lambda sections: column("B", "data", 3, 200 << 30)(column("B", "data", 2, [200 << 30])(sections)),
        "section B",
    ),
    "blocks: bytes below 0": (column("B", "data", 3, -1), "section B"),
    "blocks: stored below 0": (column("B", "data", 4, -1), "section B"),
    "blocks: shape below 0": (column("B", "data", 2, [-1, -4096]), "section B"),
    "blocks: objects": (column("B", "data", 1, "|O"), "section B"),
    "blocks: a dtype that is none": (column("B", "data", 1, "nonsense"), "section B"),
    "blocks: names cut": (values("B", "kind", lambda column: column[:-1]), "blocks"),
    "blocks: contents cut": (values("B", "data", lambda column: column[:-1]), "blocks"),
    "blocks: number 2^63": (values("B", "block", lambda column: column + (1 << 63)), "beyond"),
    "blocks: a kind that is none": (values("B", "kind", lambda column: np.array([b"nosuch"] * len(column))), "nosuch"),
    "blocks: kinds of no text": (values("B", "kind", lambda column: np.array([b"\xff"] * len(column))), "blocks"),
    "result: no JSON": (each("T", lambda _: b"\x00"), "section T"),
    "result: id with a slash": (member("T", "id", "tr_/../../x"), "id"),
    "result: sequence 2^70": (member("T", "sequence", _HUGE), "sequence"),
    "result: exit_records below 0": (member("T", "exit_records", -1), "exit_records"),
    "result: exit_records too many": (member("T", "exit_records", 1 << 40), "exit_records"),
    "result: created no time": (member("T", "created", ""), "created"),
    "result: head a list": (member("T", "head", "[]"), "head"),
    "result: head empty": (member("T", "head", "{}"), "cannot be read"),
    "result: names of objects cut": (member("T", "head.object_names", []), "cannot be read"),
    "result: twice": (twice("T"), "cannot be read"),
    "result: parts missing": (drop("P"), "exit_records"),
    "result: parts twice": (twice("P"), "cannot be read"),
    "result: tables before the result": (lambda sections: [sections[0], ("I", b"x"), *sections[1:]], "belongs"),
    "result: tables missing": (drop("I"), "belongs"),
    "tables: members out of range": (values("I", "members", lambda column: column + 1000), "members"),
    "tables: offsets out of range": (values("I", "offsets", lambda column: column + 1000), "offsets"),
    "tables: ranges below 0": (values("I", "ranges", lambda column: column - (1 << 40)), "ranges"),
    "tables: names beyond": (values("I", "ranges", lambda column: column + 7), "ranges"),
    "part: resolution without a name": (values("P", "same:resolution", lambda column: column + 200), "resolution"),
    "part: access without a name": (values("P", "same:access", lambda column: column + 200), "access"),
    "part: a column too long": (values("P", "same:size", lambda column: column.repeat(2)), "column size"),
    "part: as many records as fit into 32 bits": (
        values("P", "count", lambda column: column | 0xFFFF_0000),
        "a part of",
    ),
    "part: a column of another type": (values("P", "column:gpa", lambda column: column.astype("f8")), "column gpa"),
    "log: no list": (each("L", lambda _: b"{}"), "section L"),
    "log: numbers": (each("L", lambda _: b"[1, 2]"), "section L"),
    "log: first below 0": (member("L", "events.first", -4), "first"),
    "log: count 2^70": (member("L", "events.count", _HUGE), "count"),
    "log: count beyond the next": (member("L", "events.count", 1 << 30), "event"),
    "log: kind of no such name": (member("L", "events.kind", "nothing"), "kind"),
    "log: created in another form": (member("L", "events.created", "2026-11-29T12:00:00+00:00"), "created"),
    "log: body no JSON": (member("L", "events.body", "}"), "body"),
    "log: a result with a quote": (member("L", "events.trace", "tr_'"), "trace"),
    "log: twice": (twice("L"), "event"),
    "end: a list": (each("E", lambda _: b"[]"), "section E"),
    "end: no JSON": (each("E", lambda _: b""), "section E"),
    "end: too many": (member("E", "machines", 3), "has not the machines"),
    "end: below 0": (member("E", "machines", -2), "machines"),
    "end: not the last": (lambda sections: [*sections, sections[0]], "follows its end"),
    "end: missing": (drop("E"), "cut"),
    "a kind that is none": (lambda sections: [sections[0], ("Z", b""), *sections[1:]], "no section"),
}


def refusal(content: bytes) -> str:
    """What reading says, which comes before writing."""
    with pytest.raises(BadBackup) as refused:
        list(read_backup(io.BytesIO(content)))
    return str(refused.value)


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_backup_is_refused(good: Sections, name: str) -> None:
    tamper, word = TAMPERINGS[name]
    tampered = tamper(good)
    assert tampered != good
    said = refusal(packed(tampered))
    assert word in said and len(said) < 1000 and re.fullmatch(r"[^\n]+", said), said


@pytest.mark.parametrize("version", [0, FORMAT + 1, 1 << 31])
def test_formats_that_no_release_wrote(good: Sections, version: int) -> None:
    assert f"format {version}" in refusal(packed(good, version))


def test_a_section_that_claims_gigabytes() -> None:
    start = MAGIC + FORMAT.to_bytes(4, "little")
    assert "claims" in refusal(start + struct.pack("<BI", ord("V"), 0xFFFF_FFFF) + b"{}")


def test_the_second_machine_takes_the_first_with_it(good: Sections, tmp_path: Path) -> None:
    """Whole or nothing, also where one of several is asked for."""
    file = tmp_path / "tampered"
    file.write_bytes(packed(member("V", "tenant", "No Such!", 1)(good)))
    first = json.loads(next(data for kind, data in good if kind == "V"))["id"]
    with pytest.raises(offline.OfflineError, match="tenant"):
        offline.restore(StoreUrl.parse(f"sqlite:///{tmp_path}/store.db"), file, first, replace=False)
    with pytest.raises(offline.OfflineError, match="another schema"):
        offline.backup(StoreUrl.parse(f"sqlite:///{tmp_path}/store.db"), tmp_path / "after", None)


def test_tables_of_the_release_before_are_taken(good: Sections, tmp_path: Path) -> None:
    """Its ranges had no sub-pages of their own: every object was rounded to sub-pages."""
    file, url = tmp_path / "before", f"sqlite:///{tmp_path}/store.db"
    file.write_bytes(packed(values("I", "ranges", lambda column: column[:, :3].copy())(good)))
    vm = offline.restore(StoreUrl.parse(url), file, None, replace=False)[0]
    with serving(url) as service:
        (trace,) = service.client.get(f"/v1/vms/{vm}/traces").json()["traces"]
        exits = service.client.get(f"/v1/vms/{vm}/traces/{trace['id']}/exits").json()["exit_records"]
        assert [record["objects"] for record in exits] == [["o", "p"], ["o", "p"]]


def test_what_was_not_tampered_with_is_restored(good: Sections, tmp_path: Path) -> None:
    file, url = tmp_path / "good", f"sqlite:///{tmp_path}/store.db"
    file.write_bytes(packed(good))
    ids = offline.restore(StoreUrl.parse(url), file, None, replace=False)
    with serving(url) as service:
        assert [vm["id"] for vm in service.client.get("/v1/vms").json()["vms"]] == ids
        (trace,) = service.client.get(f"/v1/vms/{ids[0]}/traces").json()["traces"]
        exits = service.client.get(f"/v1/vms/{ids[0]}/traces/{trace['id']}/exits").json()["exit_records"]
        assert [record["objects"] for record in exits] == [["o", "p"], ["o", "p"]]
    # A result of the backup may not be put beside the one that is there.
    file.write_bytes(packed(member("V", "id", "vm_0123456789abcdef")(good)))
    with pytest.raises(offline.OfflineError, match="of another machine"):
        offline.restore(StoreUrl.parse(url), file, "vm_0123456789abcdef", replace=False)


FOOTPRINT: dict[str, Any] = {"id": "fp_0123456789abcdef", "tenant": "default", "vm": "", "size": 8, "head": "{}"}
FOOTPRINT |= {"created": "2026-11-29T12:00:00.000000Z"}


@pytest.mark.parametrize(
    ("size", "parts", "word"),
    [
        (1 << 62, [b"PAR1"], "size"),
        (8, [b"PAR1" * 2, b"P"], "has not its size"),
        (8, [b""], "has not its size"),
        (8, [b"PAR1"], "has not 8 bytes"),
    ],
)
def test_the_file_of_a_footprint_has_its_size(size: int, parts: list[bytes], word: str) -> None:
    """It is refused as soon as there is more, and not when all of that is in memory."""
    sections = [("F", json.dumps({**FOOTPRINT, "size": size}).encode()), *(("D", part) for part in parts)]
    assert word in refusal(packed([*sections, ("E", b'{"machines": 0, "footprints": 1}')]))
