"""One form of policy: a file means the same to the API, to ``subpage demo`` and to ``subpage replay``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.cli import local, policy_files
from service.platform.failures import FileError
from service.settings import Settings
from tests.contract.client import ContractClient
from tests.support import recorded

OBJECT = {"name": "table", "gpa": "0x2080", "size": 256}
FULL = {
    "name": "full",
    "about": "everything that there is",
    "subpage_bytes": 128,
    "objects": [
        {**OBJECT, "gva": "0xffffffff82000080", "about": "x"},
        {"name": "w", "gpa": 0x4FF0, "size": 32, "granularity": "page"},
    ],
    "pages": [[8, 2, "0xfffffff0"], ["0x2", 1, 1]],
}
TOML = """
name = "full"
about = "everything that there is"
pages = [[8, 2, "0xfffffff0"], ["0x2", 1, 1]]
[[objects]]
name = "table"
gpa = 0x2080
gva = "0xffffffff82000080"
about = "x"
size = 256
[[objects]]
name = "w"
gpa = "0x4ff0"
size = 32
granularity = "page"
"""


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(document: Any, name: str = "policy.json") -> Path:
        path = tmp_path / name
        path.write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())
        return path

    return write


@pytest.mark.parametrize("content", [FULL, {"name": "pages", "pages": [[2, 1, 0]]}, {"name": "o", "objects": [OBJECT]}])
def test_a_file_protects_what_the_call_does(
    vm: str, client: ContractClient, written: Callable[..., Path], content: Any
) -> None:
    path = written(content)
    shown = client.post(f"{vm}/protections", json=content).json()
    demo = policy_files.read_policy(path).protection()
    machine = local.create(local.read_policy(path), Settings())
    (replay,) = machine.protections()
    assert demo == replay
    assert (replay.name, replay.about) == (shown["name"], shown["about"])
    assert (replay.pages, replay.subpages, len(replay.objects)) == (
        shown["pages"],
        shown["subpages"],
        len(shown["objects"]),
    )
    assert [hex(word) for word in machine.subpages(0, 16).tolist()] == client.get(
        f"{vm}/subpages?gfn=0&npages=16"
    ).json()["access"]


def test_toml_says_the_same(written: Callable[..., Path]) -> None:
    toml, plain = written(TOML.encode(), "policy.toml"), written(FULL)
    assert policy_files.read_policy(toml).protection() == policy_files.read_policy(plain).protection()


def test_a_policy_without_a_name_has_that_of_its_file(written: Callable[..., Path]) -> None:
    assert policy_files.read_policy(written({"objects": [OBJECT]}, "my policy.json")).name == "my_policy"


@pytest.mark.parametrize("name", ["kernel_control_data", "kernel_text_and_data", "hot_pages_stress"])
def test_the_recorded_policies_are_taken_as_they_are(name: str) -> None:
    path = recorded.policy(name)
    policy = local.read_policy(path)
    assert policy.protections == [policy_files.read_policy(path)]
    (protection,) = local.create(policy, Settings()).protections()
    assert len(protection.ranges) == len(json.loads(path.read_bytes())["pages"])
    names = [item.name for item in protection.objects]
    assert len(set(names)) == len(names)


REFUSED = [
    # file, what is said, what the API names
    ({"objects": [OBJECT, {"name": "x", "gpa": "y", "size": 1}]}, "objects[1].gpa: must be an", "objects[1].gpa"),
    ({"objects": [OBJECT, {"name": "x", "gpa": 1}]}, "objects[1].size: is required", "objects[1].size"),
    ({"objects": [{**OBJECT, "size": 0}]}, "objects[0].size: must be at least one byte", "objects[0].size"),
    ({"objects": [OBJECT, OBJECT]}, "objects[0] and objects[1] have one name", "objects[1].name"),
    ({"objects": [{"name": "x", "gva": 1, "size": 1}]}, "objects[0].gva: is looked up", "objects[0].gva"),
    ({"objects": [{"name": "x", "symbol": "s", "size": 1}]}, "objects[0].symbol: names a symbol", "objects[0].symbol"),
    ({"objects": [OBJECT], "pages": [[1, 2]]}, "pages[0][2]: is required", "pages[0][2]"),
    ({"objects": [OBJECT], "rules": []}, "rules: is not a member", "rules"),
    ({"objects": [OBJECT], "name": "two objects/1"}, "name: ", "name"),
    ({"objects": [], "pages": []}, "an object or a range of pages", "objects"),
    ({"objects": [{**OBJECT, "gpa": 1 << 52}]}, "objects[0].gpa: must keep the object within", "objects[0].gpa"),
]  # fmt: skip


@pytest.mark.parametrize(("document", "told", "field"), REFUSED)
def test_what_is_refused_is_refused_alike(
    vm: str, client: ContractClient, written: Callable[..., Path], document: Any, told: str, field: str
) -> None:
    path = written(document)
    for read in (policy_files.read_policy, local.read_policy):
        with pytest.raises(FileError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: ") and told in str(caught.value)
    reply = client.post(f"{vm}/protections", json={"name": "p", **document})
    assert reply.status_code == 422 and reply.json()["field"] == field


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "line 1, column 1: not JSON"),
        (b'{"name": "p",\n "objects": [{]}', "line 2, column 15: not JSON"),
        (b'{"name": "\xff"}', "byte 10 is not UTF-8"),
        (b"[]", "must be an object"),
        (b"[" * 100_000, "cannot be taken in"),
        (b'{"gpa": ' + b"9" * 5000 + b"}", "cannot be taken in"),
    ],
)
def test_files_that_are_no_json(written: Callable[..., Path], content: bytes, told: str) -> None:
    path = written(content)
    with pytest.raises(FileError) as caught:
        policy_files.read_policy(path)
    assert str(caught.value).startswith(f"{path}: ") and told in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path, written: Callable[..., Path]) -> None:
    for path, told in (
        (tmp_path / "none.json", "there is no such file"),
        (tmp_path, "is a folder, not a file"),
        (written(b"x = ", "policy.toml"), "not TOML"),
        (tmp_path / "\0", "cannot be read"),
    ):
        with pytest.raises(FileError, match=told):
            policy_files.read_policy(path)
