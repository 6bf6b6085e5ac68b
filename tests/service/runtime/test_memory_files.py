"""Files behind slots: what may be opened, how often, and until when."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from pathlib import Path

import pytest

from engine.errors import InvalidValue, LimitExceeded
from service.runtime.memory_files import MemoryFiles, state_of


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A listed directory with a file in it, beside one that is not listed."""
    for name in ("shared", "secret"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ram").write_bytes(b"a" * 8192)
    return tmp_path / "shared"


def files(*directories: Path, most: int = 4) -> MemoryFiles:
    return MemoryFiles(directories, most)


def open_files() -> set[Path]:
    """What this process has open."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(link.readlink())
    return found


def test_files_below_listed_directories_are_opened(shared: Path) -> None:
    (shared / "deep" / "er").mkdir(parents=True)
    (shared / "deep" / "er" / "ram").write_bytes(b"b" * 4096)
    (shared / "link").symlink_to(shared / "deep" / "er" / "ram")
    known = files(shared)
    for name, size in (("ram", 8192), ("deep/er/ram", 4096), ("link", 4096), ("./ram", 8192)):
        file = known.attach(f"{shared}/{name}", 0, "default")
        assert (file.size, state_of(file)) == (size, ("attached", None))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("{}/ram2", "must exist: No such file"),
        ("{}/../secret/ram", "without .., below"),
        ("{}/out", "must not lead out"),
        ("{}/folder/ram", "must not lead out"),
        ("{}/nowhere", "must exist"),
        ("{}/round", "must exist: Too many levels"),
        ("{}", "must be a file"),
        ("{}/fifo", "must be a file"),
        ("{}/socket", "must be a file"),
        ("{}/ram/x", "must exist: Not a directory"),
        ("{}er/ram", "below"),
        ("ram", "absolute"),
        ("", "absolute"),
        ("/etc/passwd", "below"),
        ("/proc/self/mem", "below"),
        ("{}/a\0b", "absolute"),
        ("{}/" + "x" * 300, "must exist: File name too long"),
        ("{}/" + "x/" * 4000, "absolute"),
    ],
)
def test_nothing_else_is(shared: Path, path: str, says: str) -> None:
    (shared / "out").symlink_to("../secret/ram")
    (shared / "folder").symlink_to(shared.parent / "secret", target_is_directory=True)
    (shared / "nowhere").symlink_to("/nowhere/at/all")
    (shared / "round").symlink_to("round")
    os.mkfifo(shared / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(shared)
        try:
            listening.bind("socket")
        finally:
            os.chdir(here)
        with pytest.raises(InvalidValue, match=says) as caught:
            files(shared).attach(path.format(shared), 0, "default")
    assert caught.value.field == "backing.file"


def test_devices_are_not_opened() -> None:
    for device in ("/dev/zero", "/dev/tty"):
        with pytest.raises(InvalidValue, match="must"):
            files(Path("/dev")).attach(device, 0, "default")


def test_without_directories_there_are_no_files(shared: Path) -> None:
    with pytest.raises(InvalidValue, match="memory_files lists no directory"):
        files().attach(f"{shared}/ram", 0, "default")


def test_a_listed_directory_may_be_a_link_itself(shared: Path) -> None:
    (shared.parent / "alias").symlink_to(shared)
    assert files(shared.parent / "alias").attach(f"{shared.parent}/alias/ram", 0, "default").size == 8192


def test_directories_of_tenants_are_their_own(tmp_path: Path) -> None:
    for tenant in ("red", "blue"):
        (tmp_path / tenant).mkdir()
        (tmp_path / tenant / "ram").write_bytes(tenant.encode() * 1024)
    known = files(tmp_path / "{tenant}")
    assert known.attach(f"{tmp_path}/red/ram", 0, "red").size == 3072
    with pytest.raises(InvalidValue, match=r"/red$"):
        known.attach(f"{tmp_path}/blue/ram", 0, "red")
    (tmp_path / "red" / "peek").symlink_to("../blue/ram")
    with pytest.raises(InvalidValue, match="must not lead out"):
        known.attach(f"{tmp_path}/red/peek", 0, "red")


def test_one_file_is_open_once_and_closed_with_the_last_who_has_it(shared: Path) -> None:
    known = files(shared, most=1)
    first, second = (known.attach(f"{shared}/ram", offset, "default") for offset in (0, 4096))
    assert first.opened is second.opened and first.opened is not None
    assert shared / "ram" in open_files()
    (shared / "other").write_bytes(b"o")
    with pytest.raises(LimitExceeded, match="at most 1"):
        known.attach(f"{shared}/other", 0, "default")
    del first, second
    gc.collect()
    assert known.attach(f"{shared}/other", 0, "default").size == 1
    assert shared / "ram" not in open_files()


def test_what_becomes_of_a_file_is_told(shared: Path) -> None:
    known = files(shared)
    file = known.attach(f"{shared}/ram", 0, "default")
    os.truncate(shared / "ram", 4096)
    assert state_of(file) == ("changed", None)
    (shared / "ram").unlink()
    assert state_of(file) == ("changed", None), "it is still read"
    opened = known.reopening("default")(file)
    assert opened.descriptor == -1 and opened.reason == "must exist: No such file or directory"
    assert files().reopening("default")(file).reason == "no file may be behind a slot: memory_files lists no directory"
