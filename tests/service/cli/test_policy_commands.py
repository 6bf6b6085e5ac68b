"""``subpage policy``: policies out of symbols, and what a policy drags in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli import local, policy_files
from service.cli.app import app
from service.cli.policy_check import check, merged, report
from service.platform.failures import FileError
from service.settings import Settings
from tests.support import recorded, symbol_files
from tests.support.server import running

CONTROL_DATA: dict[str, Any] = json.loads(recorded.policy("kernel_control_data").read_bytes())


def run(*arguments: str | Path, status: int = 0) -> Any:
    result = CliRunner().invoke(app, ["policy", *map(str, arguments)])
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def file(tmp_path: Path, data: bytes, name: str = "kallsyms") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def recorded_kernel(slide: int = 0, end: str = "\n") -> bytes:
    """The lines of the recorded guest's kallsyms that the policy is about."""
    rows = [(int(item["gva"], 16), "D", item["name"], 0) for item in CONTROL_DATA["objects"]]
    text = (symbol_files.MAP + 0x1000000, "T", "_text", 0)
    return symbol_files.kallsyms(sorted([text, *rows]), slide=slide, end=end)


@pytest.mark.parametrize(
    ("slide", "phys_base", "end"), [(0, None, "\n"), (0, None, "\r\n"), (0x1A000000, "-0x1a000000", "\n"),
                                    (0x1A000000, "0xffffffffe6000000", "\n")]
)  # fmt: skip
def test_the_symbols_of_the_recorded_kernel_make_its_policy(
    tmp_path: Path, slide: int, phys_base: str | None, end: str
) -> None:
    symbols, out = file(tmp_path, recorded_kernel(slide, end)), tmp_path / "policy.json"
    objects = [f"--object={item['name']}:{item['size']}" for item in CONTROL_DATA["objects"]]
    given = [f"--phys-base={phys_base}"] if phys_base else []
    run("from-symbols", symbols, *objects, *given, "--name", "kernel_control_data", "-o", out)
    made = policy_files.read_policy(out).protection()
    expected = policy_files.read_policy(recorded.policy("kernel_control_data")).protection()
    assert [(o.name, o.gpa, o.size) for o in made.objects] == [(o.name, o.gpa, o.size) for o in expected.objects]
    assert made.subpages == expected.subpages == 249
    (protection,) = local.create(local.read_policy(out), Settings()).protections()
    assert protection == made


def test_sizes_come_from_the_file_or_are_said_to_be_assumed(tmp_path: Path) -> None:
    text, image = file(tmp_path, symbol_files.kallsyms()), file(tmp_path, symbol_files.elf(), "vmlinux")
    assumed = run("from-symbols", text, "--object", "poweroff_cmd")
    (item,) = json.loads(assumed.stdout)["objects"]
    assert item["size"] == 0xFFFFFFFF82C00000 - 0xFFFFFFFF82A5C7A0
    assert item["about"] == "size assumed: up to the next symbol" and "poweroff_cmd" in assumed.stderr
    known = run("from-symbols", image, "--object", "poweroff_cmd", "--object", "sys_call_table+0x10:8")
    assert json.loads(known.stdout)["objects"] == [
        {"name": "poweroff_cmd", "gva": "0xffffffff82a5c7a0", "gpa": "0x2a5c7a0", "size": 256},
        {"name": "sys_call_table+0x10", "gva": "0xffffffff82000370", "gpa": "0x2000370", "size": 8},
    ]


def test_the_cr3_of_the_kernel_says_where_it_is(tmp_path: Path) -> None:
    rows = [*symbol_files.KERNEL[:-1], (0xFFFFFFFF82A10000, "D", "init_top_pgt", 0), symbol_files.KERNEL[-1]]
    path = file(tmp_path, symbol_files.kallsyms(rows, slide=0x1A000000))
    made = run("from-symbols", path, "--object", "modprobe_path", "--cr3", hex(0x5210000 + 0x200000))
    # init_top_pgt would be at 0x2a10000 without KASLR: the kernel lies 0x2a00000 higher.
    assert json.loads(made.stdout)["objects"][0]["gpa"] == hex(0x2A5C6A0 + 0x2A00000)
    refused = run("from-symbols", path, "--object", "modprobe_path", "--cr3", "0x5211000", status=1)
    assert "--cr3 is not that of the kernel's own init_top_pgt" in refused.stderr


@pytest.mark.parametrize(
    ("data", "arguments", "told"),
    [
        (symbol_files.kallsyms(), ["--object", "nothing"], "--object nothing: is not the name of a symbol"),
        (symbol_files.kallsyms(), ["--object", "twice"], "is the name of 2 symbols"),
        (symbol_files.kallsyms(slide=0x200000), ["--object", "_text"], "pass phys_base"),
        (
            symbol_files.kallsyms(slide=0x200000),
            ["--object", "_text", "--slide", "0x200000"],
            "--slide must be left out",
        ),
        (symbol_files.kallsyms(), ["--object", "modprobe_path", "--phys-base", "0x1000"], "--phys-base must be a mult"),
        (symbol_files.kallsyms(), ["--object", "_end"], "nothing says how large it is"),
        (symbol_files.kallsyms(), ["--object", "modprobe_path+0x200"], "it has 0x100 bytes"),
        (symbol_files.kallsyms(), ["--object", "modprobe_path:big"], "must be NAME, NAME:SIZE"),
        (symbol_files.kallsyms() + b"cut", ["--object", "modprobe_path"], "line 15: expected an address"),
        (symbol_files.elf(machine=183), ["--object", "modprobe_path"], "e_machine: is an image of AArch64"),
        (b'{"symbols": {"a": {"address": 1}}}', ["--object", "modprobe_path"], "is not the name of a symbol"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(tmp_path: Path, data: bytes, arguments: list[str], told: str) -> None:
    out = tmp_path / "policy.json"
    result = run("from-symbols", file(tmp_path, data), *arguments, "-o", out, status=1)
    assert told in result.stderr and len(result.stderr.splitlines()) == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("data", "name"),
    [(symbol_files.kallsyms(), "System.map"), (symbol_files.elf(), "vmlinux"),
     (symbol_files.isf([row for row in symbol_files.KERNEL if row[2] != "twice"]), "isf.json")],
)  # fmt: skip
def test_symbols_in_place_of_a_policy_say_which_command_makes_one(tmp_path: Path, data: bytes, name: str) -> None:
    path = file(tmp_path, data, name)
    for read in (policy_files.read_policy, local.read_policy):
        with pytest.raises(FileError, match="subpage policy from-symbols") as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: is no policy")


POLICY = {
    "name": "p",
    "objects": [
        {"name": "whole", "gpa": "0x1000", "size": 128},
        {"name": "begin", "gpa": "0x2000", "size": 8},
        {"name": "end", "gpa": "0x2078", "size": 16},
        {"name": "inside", "gpa": "0x2080", "size": 4},
        {"name": "across", "gpa": "0x3ff8", "size": 16},
        {"name": "far", "gpa": "0x40000000", "size": 128},
    ],
    "pages": [["0x3ffff", 2, 0]],
}


def test_check_says_what_each_object_drags_in(tmp_path: Path) -> None:
    path = file(tmp_path, json.dumps(POLICY).encode(), "policy.json")
    found = json.loads(run("check", path, "--memory-slots", "0:1GiB", "--json", status=1).stdout)
    rows = {item["name"]: item for item in found["objects"]}
    assert {name: (item["subpages"], item["neighbours"]) for name, item in rows.items()} == {
        "whole": (1, 0), "begin": (1, 120), "end": (2, 240), "inside": (1, 124), "across": (2, 240), "far": (1, 0),
    }  # fmt: skip
    assert rows["begin"]["shares"] == ["end"] and rows["end"]["shares"] == ["begin"]
    assert rows["end"]["overlaps"] == ["inside"] and rows["inside"]["overlaps"] == ["end"]
    assert [name for name, item in rows.items() if item["straddles"]] == ["across"]
    assert [name for name, item in rows.items() if item["outside"]] == ["far"]
    assert (found["outside_ram"], found["pages_outside_ram"], found["neighbours"]) == (2, [0], 724)
    shown = run("check", path, "--memory-slots", "0:512MiB", "--memory-slots", "0x20000000:1GiB").stdout
    assert "overlaps inside; shares a sub-page with begin" in shown and "0 outside RAM" in shown
    assert "RAM not given" in run("check", path).stdout


def test_the_recorded_policy_has_no_overlaps_that_a_plain_search_does_not_find() -> None:
    protection = policy_files.read_policy(recorded.policy("kernel_control_data")).protection()
    for item, other in zip(protection.objects, check(protection, None), strict=True):
        end = item.gpa + item.size
        common = {o.name for o in protection.objects if o is not item and o.gpa < end and item.gpa < o.gpa + o.size}
        assert set(other.overlaps) <= common
    assert report(protection, merged([(0, 1 << 30)]))["outside_ram"] == 0


@pytest.mark.parametrize("slot", ["1GiB", "0:", "0:-4", "x:1GiB", "0:1GB"])
def test_a_slot_that_is_none_is_refused(tmp_path: Path, slot: str) -> None:
    path = file(tmp_path, json.dumps(POLICY).encode(), "policy.json")
    assert "GPA:SIZE" in run("check", path, "--memory-slots", slot, status=2).stderr


def test_check_asks_a_service_for_the_memory_of_a_machine(tmp_path: Path) -> None:
    path = file(tmp_path, json.dumps(POLICY).encode(), "policy.json")
    slots = [{"slot": 0, "gpa": 0, "size": 1 << 29}, {"slot": 1, "gpa": 1 << 29, "size": 1 << 30}]
    with running() as service:
        vm = service.client.post("/v1/vms", json={"memory_slots": slots}).json()["id"]
        assert "0 outside RAM" in run("check", path, "--vm", vm, "--url", service.url).stdout
        assert "404" in run("check", path, "--vm", "vm_none", "--url", service.url, status=6).stderr
