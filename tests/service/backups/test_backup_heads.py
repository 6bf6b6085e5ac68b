"""Heads and blocks of machines in backups: those of an earlier release come back, and each vCPU has its record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from service.backups.checks import BadBackup, machine_of
from service.backups.files import Saved, read_backup
from tests.support.http import set_map
from tests.support.stores import command, serving

# Written by the release before head format 2: a VM with the vCPUs 0 and 1, 1 MiB of RAM at 0 and SPP, the object "o" of
# 256 bytes at 0x1000 protected, text there, and one replay.
EARLIER = Path(__file__).with_name("head-format-1.backup")


@pytest.fixture
def earlier() -> Saved:
    with EARLIER.open("rb") as file:
        (saved,) = read_backup(file)
    return saved


def test_a_machine_of_an_earlier_release_comes_back(earlier: Saved, tmp_path: Path) -> None:
    head = json.loads(earlier.record.head)
    assert head["format"] == 1 and head["config"]["vcpus"][1] == {"id": 1, "vp_index": None, "cpuid": []}
    url = f"sqlite:///{tmp_path}/new.db"
    done = command("restore", EARLIER, "--store", url)
    assert done.exit_code == 0 and "1 VMs restored" in done.output, done.output
    vm = f"/v1/vms/{earlier.record.id}"
    with serving(url) as service:
        client = service.client
        assert [vcpu["id"] for vcpu in client.get(vm).json()["vcpus"]] == [0, 1]
        maps = client.get(f"{vm}/subpages", params={"gfn": 0, "npages": 3}).json()["access"]
        assert maps == ["0xffffffff", "0xfffffffc", "0xffffffff"]
        text = client.get(f"{vm}/memory", params={"gpa": 0x1000, "size": 18}).content
        assert text == b"an earlier release"
        (trace,) = client.get(f"{vm}/traces").json()["traces"]
        assert trace["violations"] == 2
        again = client.post(f"{vm}/traces", json={"accesses": [{"gpa": 0x1000, "vcpu": 1}]}).json()
        assert again["violations"] == 1
        set_map(client, vm, 2, 0)
    # Stored anew by this release, the machine is of today's format.
    file = tmp_path / "today.backup"
    assert command("backup", file, "--store", url).exit_code == 0
    with file.open("rb") as stream:
        (saved,) = read_backup(stream)
    assert json.loads(saved.record.head)["format"] == 2


@pytest.mark.parametrize(("member", "value"), [("cpuid", {}), ("cpuid", None), ("reset", 0), ("more", None)])
def test_other_defaults_are_none_that_a_release_wrote(earlier: Saved, member: str, value: object) -> None:
    head = json.loads(earlier.record.head)
    head["config"]["vcpus"][1][member] = value
    with pytest.raises(BadBackup, match="cannot be read"):
        machine_of(replace(earlier.record, head=json.dumps(head)), earlier.blocks)


def test_a_format_is_a_number(earlier: Saved) -> None:
    head = json.dumps({**json.loads(earlier.record.head), "format": True})
    with pytest.raises(BadBackup, match="formats up to 2"):
        machine_of(replace(earlier.record, head=head), earlier.blocks)


def test_a_record_of_a_vcpu_is_missing(earlier: Saved) -> None:
    assert machine_of(earlier.record, earlier.blocks)
    blocks = [block for block in earlier.blocks if block[:2] != ("vcpu", 2)]
    with pytest.raises(BadBackup, match="has 2 records of vCPUs or more"):
        machine_of(earlier.record, blocks)


def test_frames_are_too_few_for_the_room(earlier: Saved) -> None:
    head = json.loads(earlier.record.head)
    head["config"]["vcpu_room"] = head["frames"]
    with pytest.raises(BadBackup, match="1307 frames or more"):
        machine_of(replace(earlier.record, head=json.dumps(head)), [b for b in earlier.blocks if b[1] < 3])
