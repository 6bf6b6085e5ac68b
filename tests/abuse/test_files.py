"""Whatever the umask, the files of the service are its owner's alone, and no link is followed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from service.backups import offline
from service.platform.files import make_folder, make_private
from service.security.tokens import FileTokens, mint, utc_now
from service.storage.database import connect
from service.storage.urls import StoreUrl
from tests.abuse.process import serving


def modes(folder: Path) -> dict[str, str]:
    """Of everything under a folder."""
    return {
        str(path.relative_to(folder)): oct(stat.S_IMODE(path.lstat().st_mode)) for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("umask", [0o022, 0o000])
def test_files_of_a_running_service(tmp_path: Path, umask: int) -> None:
    """The store with its log, its lock, the tokens and the audit log, in folders that are made."""
    home = tmp_path / "home"
    store = f"sqlite:///{home}/a/b/store.db"
    with serving(umask, store=store, audit_log=tmp_path / "audit", token_file=home / "tokens.db") as victim:
        with victim.client() as client:
            while client.get("/readyz").status_code != 200:
                pass
            assert client.post("/v1/vms", json={}).status_code == 201
        found = modes(home)
        assert {"a/b/store.db", "a/b/store.db-wal", "a/b/store.db-shm", "a/b/store.db.lock"} < set(found)
        assert {mode for name, mode in found.items() if (home / name).is_file()} == {"0o600"}
        assert {mode for name, mode in found.items() if (home / name).is_dir()} == {"0o700"}
        assert stat.S_IMODE(home.stat().st_mode) == 0o700 and stat.S_IMODE((tmp_path / "audit").stat().st_mode) == 0o600


@pytest.fixture
def no_umask() -> object:
    before = os.umask(0)
    yield None
    os.umask(before)


@pytest.fixture
def store(tmp_path: Path, no_umask: None) -> StoreUrl:
    url = StoreUrl.parse(f"sqlite:///{tmp_path}/store.db")
    (tmp_path / "empty").write_bytes(b"SUBPAGE\0\2\0\0\0" + bytes.fromhex("450f000000") + b'{"machines": 0}')
    with pytest.raises(offline.OfflineError):
        offline.restore(url, tmp_path / "empty", None, replace=False)  # its checksum is missing: the file is made
    from service.storage.migrate import migrate

    engine = connect(url)
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        migrate(connection)
    engine.dispose()
    return url


def test_a_backup_and_what_is_written_before_it(tmp_path: Path, store: StoreUrl) -> None:
    """A link where the unfinished file used to be is neither followed nor written to."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (tmp_path / "file.part").symlink_to(elsewhere)
    assert offline.backup(store, tmp_path / "file", None) == 0
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    assert elsewhere.read_text() == "mine" and (tmp_path / "file.part").is_symlink()
    assert len(list(tmp_path.glob("*.part"))) == 1


def test_a_link_to_nothing_is_no_place_for_a_store(tmp_path: Path) -> None:
    (tmp_path / "store.db").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        make_private(tmp_path / "store.db")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.usefixtures("no_umask")
def test_tokens_and_folders(tmp_path: Path) -> None:
    record, _ = mint("a", now=utc_now())
    FileTokens(tmp_path / "tokens").add(record)
    make_folder(tmp_path / "a" / "b" / "c")
    make_folder(tmp_path / "a" / "b" / "c")
    assert modes(tmp_path) == {"tokens": "0o600", "a": "0o700", "a/b": "0o700", "a/b/c": "0o700"}


@pytest.mark.usefixtures("no_umask")
def test_what_is_there_keeps_its_mode(tmp_path: Path) -> None:
    """A store that its operator has opened to a group stays open to it."""
    path = tmp_path / "store.db"
    path.touch(0o640)
    make_private(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
