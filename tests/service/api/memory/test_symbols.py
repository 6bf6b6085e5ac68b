"""Symbols over HTTP: loaded, looked up, in objects and in exit records."""

from __future__ import annotations

import gzip
import lzma
from typing import Any

import pyarrow as pa
import pytest

from service.settings import MIB
from tests.contract.client import ContractClient
from tests.support import symbol_files
from tests.support.guest_pages import MODES, GuestPages
from tests.support.http import OCTETS
from tests.support.stores import serving

KALLSYMS = symbol_files.kallsyms()
TEXT = {"Content-Type": "text/plain"}


@pytest.fixture
def guest(client: ContractClient) -> str:
    slots = [{"slot": 0, "gpa": 0, "size": 64 * MIB}]
    created = client.post("/v1/vms", json={"spp": True, "memory_slots": slots})
    return str(created.headers["Location"])


def load(client: ContractClient, vm: str, data: bytes = KALLSYMS, query: str = "", **headers: str) -> Any:
    return client.post(f"{vm}/symbols{query}", content=data, headers=TEXT | headers)


def test_load_look_up_and_forget(guest: str, client: ContractClient) -> None:
    url = f"{guest}/symbols"
    assert client.get(url).status_code == client.delete(url).status_code == 404
    loaded = load(client, guest)
    assert loaded.status_code == 201 and loaded.headers["Location"] == url
    about = loaded.json()
    assert (about["format"], about["symbols"], about["slide"], about["phys_base"]) == ("kallsyms", 14, "0x0", "0x0")
    assert client.get(url).json() == about and about["matches"] is None
    (match,) = client.get(f"{url}?name=modprobe_path").json()["matches"]
    assert match == {
        "label": "modprobe_path",
        "name": "modprobe_path",
        "gva": "0xffffffff82a5c6a0",
        "gpa": "0x2a5c6a0",
        "size": 256,
        "size_assumed": True,
    }
    for at in ("0x2a5c6b0", "0xffffffff82a5c6b0", "0xffff888002a5c6b0"):
        (found,) = client.get(f"{url}?at={at}").json()["matches"]
        assert found == {**match, "label": "modprobe_path+0x10"}
    assert client.get(f"{url}?name=nothing").json()["matches"] == client.get(f"{url}?at=0").json()["matches"] == []
    assert len(client.get(f"{url}?name=twice").json()["matches"]) == 2
    assert client.get(f"{url}?name=a&at=0").status_code == 422
    assert client.delete(url).status_code == 204
    assert client.get(url).status_code == 404


def test_a_second_file_replaces_the_first(guest: str, client: ContractClient) -> None:
    load(client, guest)
    packed = lzma.compress(symbol_files.isf([row for row in symbol_files.KERNEL if row[2] != "twice"]))
    again = client.post(f"{guest}/symbols?slide=0x200000&phys_base=0xffffffffffe00000", content=packed, headers=OCTETS)
    assert again.status_code == 201, again.text
    about = client.get(f"{guest}/symbols?name=modprobe_path").json()
    assert (about["format"], about["slide"], about["phys_base"]) == ("isf", "0x200000", "0xffffffffffe00000")
    (match,) = about["matches"]
    assert (match["gva"], match["gpa"], match["size_assumed"]) == ("0xffffffff82c5c6a0", "0x2a5c6a0", False)


@pytest.mark.parametrize(
    ("data", "query", "field", "told"),
    [
        (b"", "", "body", "is empty"),
        (KALLSYMS + b"cut in ha", "", "body", "line 15: expected an address"),
        (symbol_files.elf(machine=183), "", "body", "AArch64"),
        (KALLSYMS, "?format=pdb", "format", "must be one of kallsyms"),
        (KALLSYMS, "?format=elf", "body", "is no ELF image"),
        (KALLSYMS, "?slide=0x1000", "slide", "multiple of"),
        (KALLSYMS, "?phys_base=12345", "phys_base", "multiple of"),
        (b'{"symbols": {"a b": {"address": 1}}}', "", "body", "a name has"),
    ],
)
def test_bad_files_change_nothing(
    guest: str, client: ContractClient, data: bytes, query: str, field: str, told: str
) -> None:
    load(client, guest)
    before = client.get(f"{guest}/symbols").json()
    refused = load(client, guest, data, query)
    assert refused.status_code == 422, refused.text
    assert refused.json()["field"] == field and told in refused.json()["detail"]
    assert client.get(f"{guest}/symbols").json() == before


def test_a_file_that_is_too_large_unpacked_changes_nothing(guest: str, client: ContractClient) -> None:
    # Level 1: what is made of it does not matter, and it is made in a second.
    test_bad_files_change_nothing(guest, client, gzip.compress(bytes(512 * MIB), 1), "", "body", "at most")


def test_a_body_of_another_type_is_refused(guest: str, client: ContractClient) -> None:
    assert client.post(f"{guest}/symbols", content=KALLSYMS, headers={"Content-Type": "image/png"}).status_code == 415


def test_objects_by_symbol_are_those_of_its_addresses(guest: str, client: ContractClient) -> None:
    load(client, guest)
    objects = [
        {"symbol": "modprobe_path"},
        {"symbol": "sys_call_table", "name": "calls", "size": 16, "offset": 8, "about": "two of them"},
    ]
    made = client.post(f"{guest}/protections", json={"name": "k", "objects": objects}).json()
    assert all(item.pop(name) is None for item in made["objects"] for name in ("vcpu", "cr3", "pieces"))
    assert made["objects"] == [
        {
            "name": "modprobe_path",
            "gpa": "0x2a5c6a0",
            "gva": "0xffffffff82a5c6a0",
            "size": 256,
            "granularity": "subpage",
            "about": "size assumed: up to the next symbol",
        },
        {
            "name": "calls",
            "gpa": "0x2000368",
            "gva": "0xffffffff82000368",
            "size": 16,
            "granularity": "subpage",
            "about": "two of them",
        },
    ]


def test_objects_of_modules_are_where_the_guests_tables_say(guest: str, client: ContractClient) -> None:
    probe, root = 0xFFFFFFFFC0201000, 3 * MIB
    pages = GuestPages(MODES["4-level"], root)
    pages.map(probe, 2 * MIB)
    pages.map(0xFFFFFFFF82A5C000, 5 * MIB)
    pages.store(lambda gpa, data: client.put(f"{guest}/memory?gpa={gpa}", content=data, headers=OCTETS))
    load(client, guest)
    module = {"symbol": "e1000_probe [e1000]", "size": 16, "offset": 8}
    refused = client.post(f"{guest}/protections", json={"name": "k", "objects": [module]})  # its vCPU's CR3 is 0
    assert refused.json()["field"] == "objects[0].gva" and "must translate" in refused.json()["detail"]
    objects = [{**module, "cr3": root}, {"symbol": "modprobe_path", "cr3": root}]
    made = client.post(f"{guest}/protections", json={"name": "k", "objects": objects}).json()["objects"]
    places = [(item["gva"], item["gpa"], item["vcpu"], item["cr3"]) for item in made]
    assert places[0] == (hex(probe + 8), hex(2 * MIB + 8), 0, hex(root))
    assert places[1] == ("0xffffffff82a5c6a0", hex(5 * MIB + 0x6A0), 0, hex(root))


@pytest.mark.parametrize(
    ("item", "field", "told"),
    [
        ({"symbol": "e1000_probe"}, "symbol", "a module has one: e1000_probe [e1000]"),
        ({"symbol": "nothing"}, "symbol", "is not the name"),
        ({"symbol": "twice"}, "symbol", "is the name of 2 symbols"),
        ({"symbol": "cpu_info"}, "symbol", "outside the kernel's image"),
        ({"symbol": "_end"}, "size", "nothing says how large"),
        ({"symbol": "modprobe_path", "offset": 256}, "size", "it has 256 bytes"),
        ({"symbol": "modprobe_path", "gpa": 4096}, "gpa", "must be left out"),
        ({"name": "x", "gpa": 4096, "size": 8, "offset": 1}, "offset", "must be left out"),
        ({"gpa": 4096, "size": 8}, "name", "is required"),
    ],
)
def test_objects_without_one_place_are_refused(
    guest: str, client: ContractClient, item: dict[str, Any], field: str, told: str
) -> None:
    load(client, guest)
    good = {"name": "good", "gpa": "0x1000", "size": 8}
    refused = client.post(f"{guest}/protections", json={"name": "k", "objects": [good, item]})
    assert refused.status_code == 422, refused.text
    assert refused.json()["field"] == f"objects[1].{field}" and told in refused.json()["detail"]
    assert client.get(f"{guest}/protections").json()["protections"] == []


def test_a_moved_kernel_says_what_to_pass(guest: str, client: ContractClient) -> None:
    loaded = load(client, guest, symbol_files.kallsyms(slide=0x1A000000)).json()
    assert loaded["phys_base"] is None and "KASLR" in loaded["found_by"]
    refused = client.post(f"{guest}/protections", json={"name": "k", "objects": [{"symbol": "modprobe_path"}]})
    assert refused.status_code == 422 and "pass phys_base" in refused.json()["detail"]


def test_a_kernel_in_memory_is_found(guest: str, client: ContractClient) -> None:
    linked = 0xFFFFFFFF82001180 - symbol_files.MAP
    client.put(f"{guest}/memory?gpa={linked + 0x200000:#x}", content=symbol_files.BANNER, headers=OCTETS)
    loaded = load(client, guest, symbol_files.kallsyms(slide=0x1A000000)).json()
    assert loaded["found_by"] == f"memory: linux_banner at {linked + 0x200000:#x}"
    made = client.post(f"{guest}/protections", json={"name": "k", "objects": [{"symbol": "modprobe_path"}]}).json()
    assert made["objects"][0]["gpa"] == "0x2c5c6a0"
    other = load(client, guest, symbol_files.kallsyms([(a + 64, k, n, s) for a, k, n, s in symbol_files.KERNEL]))
    assert other.status_code == 422 and "another kernel" in other.json()["detail"]


def test_exits_have_names_where_there_are_symbols(guest: str, client: ContractClient) -> None:
    target = {"name": "k", "objects": [{"name": "modprobe_path", "gpa": "0x2a5c6a0", "size": 256}]}
    client.post(f"{guest}/protections", json=target)
    records = [
        {"gpa": "0x2a5c6b0", "pc": 0xFFFFFFFF81000048},
        {"gpa": "0x2a5c680", "pc": 0x400000},
    ]
    bare = client.post(f"{guest}/traces?carry=pc", json={"accesses": records})
    assert "symbol" not in bare.json()["exit_records"][0]
    load(client, guest)
    result = client.post(f"{guest}/traces?carry=pc", json={"accesses": records}).json()
    names = [(row["symbol"], row["writer"]) for row in result["exit_records"]]
    assert names == [("modprobe_path+0x10", "verify_cpu+0x8"), ("page_offset_base+0x42668", None)]
    url = f"{guest}/traces/{result['id']}"
    rows = client.get(f"{url}/exits").json()["exit_records"]
    assert rows == result["exit_records"] == client.get(url).json()["exit_records"]
    lines = client.get(f"{url}/exits", headers={"Accept": "application/x-ndjson"}).text.splitlines()
    assert len(lines) == 2 and '"writer":"verify_cpu+0x8"' in lines[0]
    stream = client.get(f"{url}/exits", headers={"Accept": "application/vnd.apache.arrow.stream"}).content
    table = pa.ipc.open_stream(stream).read_all()
    assert [tuple(row[name] for name in ("symbol", "writer")) for row in table.to_pylist()] == names
    plain = client.post(f"{guest}/traces", json={"accesses": records}).json()["exit_records"][0]
    assert (plain["symbol"], plain["writer"]) == names[0], "pc is carried unasked"


@pytest.mark.parametrize("media", ["application/json", "text/plain", "application/octet-stream"])
def test_symbols_in_place_of_a_policy_say_what_makes_one(guest: str, client: ContractClient, media: str) -> None:
    for data in (KALLSYMS, symbol_files.elf()):
        refused = client.post(f"{guest}/protections", content=data, headers={"Content-Type": media})
        assert refused.status_code == (400 if media == "application/json" else 415), refused.text
        assert "subpage policy from-symbols" in refused.json()["detail"]


def test_symbols_outlive_the_service(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    with serving(url) as service:
        vm = service.client.post("/v1/vms", json={}).headers["Location"]
        before = load(service.client, vm).json()
    with serving(url) as service:
        assert service.client.get(f"{vm}/symbols").json() == before


def test_a_guarded_machine_forgets_only_what_was_seen(client: ContractClient) -> None:
    vm = client.post("/v1/vms", json={"require_match": True}).headers["Location"]
    load(client, vm)
    tag = client.get(f"{vm}/symbols").headers["ETag"]
    assert client.get(f"{vm}/symbols", headers={"If-None-Match": tag}).status_code == 304
    assert client.delete(f"{vm}/symbols").status_code == 428
    load(client, vm, symbol_files.kallsyms(symbol_files.KERNEL[:4]))
    assert client.delete(f"{vm}/symbols", headers={"If-Match": tag}).status_code == 412
    tag = client.get(f"{vm}/symbols").headers["ETag"]
    assert client.delete(f"{vm}/symbols", headers={"If-Match": tag}).status_code == 204


def test_symbols_count_as_memory_of_their_tenant(guest: str, client: ContractClient) -> None:
    before = client.get(f"{guest}/counters").json()["counters"]
    rows = [(symbol_files.MAP + 0x1000000 + 16 * i, "D", f"a_symbol_of_some_length_{i}", 8) for i in range(20000)]
    assert load(client, guest, symbol_files.elf(rows)).status_code == 201
    after = client.get(f"{guest}/counters").json()["counters"]
    assert after["memory_bytes"] - before["memory_bytes"] >= 4096 * after["frames_symbols"] > 1 << 20


def test_what_a_machine_has_no_room_for_is_refused() -> None:
    rows = [(symbol_files.MAP + 0x1000000 + 16 * i, "D", f"a_symbol_of_some_length_{i}", 8) for i in range(20000)]
    with serving("memory", max_table_frames=64) as service:
        vm = service.client.post("/v1/vms", json={}).headers["Location"]
        assert load(service.client, vm, symbol_files.elf(rows)).status_code == 429
        assert service.client.get(f"{vm}/symbols").status_code == 404
