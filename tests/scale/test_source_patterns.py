"""Names and patterns, and the files that they stand for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scale import sources
from scale.errors import ScaleError
from scale.sources import Source, expand


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a1.parquet", "a2.parquet", "b1.parquet", "a1.txt", "in/a3.parquet", "in/deep/a4.parquet", "[x].txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a*.parquet", ["a1.parquet", "a2.parquet"]),
        ("./a?.parquet", ["./a1.parquet", "./a2.parquet"]),
        ("[ab]1.*", ["a1.parquet", "a1.txt", "b1.parquet"]),
        ("[!a]1.*", ["b1.parquet"]),
        ("*/a3.parquet", ["in/a3.parquet"]),
        ("in/**", ["in/a3.parquet", "in/deep/a4.parquet"]),
        ("**/a[1-4].parquet", ["a1.parquet", "a2.parquet", "in/a3.parquet", "in/deep/a4.parquet"]),
        ("in/../a1.*", ["in/../a1.parquet", "in/../a1.txt"]),
        ("[x].txt", ["[x].txt"]),  # a file of that name is meant
    ],
)
def test_a_pattern_stands_for_files_in_order(folder: Path, pattern: str, names: list[str]) -> None:
    found = expand([pattern])
    assert [source.name for source in found] == names
    assert all((source.size, source.changed) == _of(source.name) for source in found)


def _of(name: str) -> tuple[int, int]:
    status = Path(name).stat()
    return status.st_size, status.st_mtime_ns


def test_paths_are_absolute_or_not_as_they_were_given(folder: Path) -> None:
    assert [source.name for source in expand([f"{folder}/b*", "a1.txt"])] == [f"{folder}/b1.parquet", "a1.txt"]
    assert expand(["in/a3.parquet"])[0].label == "a3.parquet"
    assert Source("s3://bucket/boots/a.parquet?scheme=http", 0, 0).label == "a.parquet"


def test_a_file_that_is_not_there_is_for_whoever_opens_it(folder: Path) -> None:
    assert expand(["nix.parquet"]) == [Source("nix.parquet", 0, 0)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nix*.parquet", "nix*.parquet: matches no file"),
        ("nix/*.parquet", "nix/*.parquet: matches no file"),
        ("nix://bucket/a", "nix://bucket/a: cannot be reached: Unrecognized filesystem type"),
    ],
)
def test_what_stands_for_nothing_is_refused(folder: Path, text: str, said: str) -> None:
    with pytest.raises(ScaleError) as refusal:
        expand(["a1.txt", text])
    assert str(refusal.value).startswith(said)


def test_more_files_than_a_footprint_has_traces_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_ORIGINS", 2)
    with pytest.raises(ScaleError, match=r"\*\*: 7 files: a footprint has at most 2 traces"):
        expand(["**"])


def test_options_of_an_address_are_no_pattern(folder: Path) -> None:
    assert sources.inside("s3://bucket/boots/?scheme=http", "x") == "s3://bucket/boots/x?scheme=http"
    assert sources.inside("boots", "x") == "boots/x"


def test_a_file_that_changes_is_noticed(folder: Path) -> None:
    (source,) = expand(["a1.txt"])
    sources.check_unchanged(source)
    os.utime("a1.txt", ns=(1, 1))
    with pytest.raises(ScaleError, match=r"a1\.txt: has changed since it was found"):
        sources.check_unchanged(source)


def test_an_object_is_read_as_it_was_found(folder: Path) -> None:
    """A file has an address, too."""
    (source,) = expand([f"file://{folder}/a1.*xt"])
    with sources.opened(source) as file:
        assert file.read() == b"a1.txt" and file.seek(0) == 0
    (folder / "a1.txt").write_text("longer than it was")
    with pytest.raises(ScaleError, match=r"has 18 bytes now, and had 6 when it was found"), sources.opened(source):
        pass
    (folder / "a1.txt").unlink()
    with pytest.raises(ScaleError, match=r"a1\.txt: there is no such file"), sources.opened(source):
        pass
