"""Backups: everything comes back, elsewhere and later; what is damaged or newer is refused whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.backups.files import FORMAT, MAGIC
from service.backups.offline import LEFT
from tests.support.http import new_vm, set_map
from tests.support.stores import command, picture, rows_in, run_sql, section, serving


@pytest.fixture
def filled(tmp_path: Path) -> tuple[str, str, str]:
    """A SQLite store with two machines, one of which has replays; its URL and theirs."""
    url = f"sqlite:///{tmp_path}/first.db"
    with serving(url) as service:
        vm, other = new_vm(service.client), new_vm(service.client)
        set_map(service.client, vm, 1, 0)
        for count in (0, 3):
            body = {"accesses": [{"gpa": 0x1000}] * count + [{"gpa": 0x8000}]}
            service.client.post(f"{vm}/traces", json=body)
        service.client.post(f"{other}/protections", json={"name": "p", "objects": [{"name": "o", "gpa": 0, "size": 9}]})
    return url, vm, other


def test_all_of_a_store_goes_to_another_kind_of_store(
    filled: tuple[str, str, str], store_url: str, tmp_path: Path
) -> None:
    url, vm, other = filled
    file = tmp_path / "all.backup"
    with serving(url) as service:
        before = [picture(service.client, vm), picture(service.client, other)]
        done = command("backup", file, "--store", url)
        assert done.exit_code == 0 and "2 VMs written" in done.output, "also while a service owns the store"
        assert done.output.splitlines()[-1] == LEFT and "jobs" in LEFT and "Idempotency-Key" in LEFT
    done = command("restore", file, "--store", store_url)
    assert done.exit_code == 0 and "2 VMs restored" in done.output, done.output
    assert done.output.splitlines()[-1] == LEFT
    with serving(store_url) as service:
        after = [picture(service.client, vm), picture(service.client, other)]
        for now, then in zip(after, before, strict=True):
            assert now[0].pop("revision") == then[0].pop("revision") + 1, "tags of before no longer match"
            assert now == then
        third = new_vm(service.client)
        assert len(service.client.get("/v1/vms").json()["vms"]) == 3 and third not in (vm, other)


def test_one_machine_and_replacing_it(filled: tuple[str, str, str], tmp_path: Path) -> None:
    url, vm, other = filled
    name = vm.rpartition("/")[2]
    file = tmp_path / "one.backup"
    assert command("backup", file, "--vm", name, "--store", url).exit_code == 0
    with serving(url) as service:
        before = picture(service.client, vm)
        kept = picture(service.client, other)
        set_map(service.client, vm, 1, 0x77)
        changed = service.client.get(vm).json()["revision"]
    again = command("restore", file, "--store", url)
    assert again.exit_code == 1 and "--replace" in again.output
    assert command("restore", file, "--replace", "--vm", name, "--store", url).exit_code == 0
    with serving(url) as service:
        now = picture(service.client, vm)
        assert now[0].pop("revision") == changed + 1 and before[0].pop("revision")
        assert now == before and picture(service.client, other) == kept
    assert rows_in(url, "traces") == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("backup", "{new}", "--store", "memory"), "live in their process"),
        (("backup", "{new}", "--store", "sqlite:///{nowhere}"), "there is no store"),
        (("backup", "{new}", "--vm", "vm_x", "--store", "{url}"), "has no VM vm_x"),
        (("backup", "{file}", "--store", "{url}"), "exists"),
        (("backup", "{nowhere}/a/b", "--store", "{url}"), "cannot be written"),
        (("backup", "{new}", "--store", "postgresql://nobody@127.0.0.1:1/none"), "cannot be reached"),
        (("restore", "{new}", "--store", "{url}"), "there is no such file"),
        (("restore", "{file}", "--vm", "vm_x", "--store", "sqlite:///{nowhere}"), "has no VM vm_x"),
    ],
)
def test_what_cannot_be_is_said(
    filled: tuple[str, str, str], tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    file = tmp_path / "made.backup"
    assert command("backup", file, "--store", filled[0]).exit_code == 0
    names = {"url": filled[0], "file": file, "new": tmp_path / "new", "nowhere": tmp_path / "nowhere"}
    done = command(*(argument.format(**names) for argument in arguments))
    assert done.exit_code == 1 and says in done.output, done.output
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob("*.part"))


def test_a_bad_store_is_said() -> None:
    done = command("backup", "file", "--store", "oracle://x")
    assert done.exit_code == 2 and "sqlite:///path" in done.output


def test_restoring_waits_for_nobody(filled: tuple[str, str, str], tmp_path: Path) -> None:
    """A service owns the store: its machines in memory would no longer be those of the store."""
    file = tmp_path / "all.backup"
    assert command("backup", file, "--store", filled[0]).exit_code == 0
    with serving(filled[0]):
        done = command("restore", file, "--replace", "--store", filled[0])
        assert done.exit_code == 1 and "a service owns the store" in done.output


VM = (
    b'{"number": 1, "id": "vm_0123456789abcdef", "created": "2026-11-29T12:00:00+00:00", "revision": 1, '
    b'"head": "{\\"format\\": 99, \\"frames\\": 0}"}'
)
START = MAGIC + FORMAT.to_bytes(4, "little")
DAMAGED = {
    "text": (b"hello, this is no backup", "not a backup"),
    "newer": (MAGIC + (FORMAT + 1).to_bytes(4, "little"), f"format {FORMAT + 1}, written by a later release"),
    "cut": (START, "its end is missing"),
    "crc": (START + section(b"E", b'{"machines": 0}')[:-1] + b"x", "checksum"),
    "count": (START + section(b"E", b'{"machines": 1}'), "has not the machines"),
    "order": (START + section(b"B", b""), "before the machine"),
    "kind": (
        START + section(b"V", VM) + section(b"?", b""),
        "no section",
    ),
    "head": (
        START + section(b"V", VM) + section(b"E", b'{"machines": 1}'),
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_and_newer_backups_are_refused(name: str, tmp_path: Path) -> None:
    content, says = DAMAGED[name]
    file = tmp_path / "bad.backup"
    file.write_bytes(content)
    done = command("restore", file, "--store", f"sqlite:///{tmp_path}/new.db")
    assert done.exit_code == 1 and says in done.output, done.output


def test_damage_at_the_end_restores_nothing(filled: tuple[str, str, str], tmp_path: Path) -> None:
    file = tmp_path / "all.backup"
    assert command("backup", file, "--store", filled[0]).exit_code == 0
    file.write_bytes(file.read_bytes()[:-30])
    url = f"sqlite:///{tmp_path}/second.db"
    assert command("restore", file, "--store", url).exit_code == 1
    assert command("backup", tmp_path / "x", "--store", url).exit_code == 1, "nothing was made, not even the tables"


def test_a_store_with_another_schema(filled: tuple[str, str, str], tmp_path: Path) -> None:
    run_sql(filled[0], "UPDATE alembic_version SET version_num = '9999'")
    done = command("backup", tmp_path / "x", "--store", filled[0])
    assert done.exit_code == 1 and "another schema" in done.output
    file = tmp_path / "y"
    file.write_bytes(START + section(b"E", b'{"machines": 0}'))
    done = command("restore", file, "--store", filled[0])
    assert done.exit_code == 1 and "9999" in done.output
