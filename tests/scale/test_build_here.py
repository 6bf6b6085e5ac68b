"""Footprints of many files in one process: added up in a tree, kept one by one, and large files in pieces."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.footprint.combine import merge
from engine.footprint.places import BYTES, SPANS, By, Footprint
from scale import groups
from scale.build import Progress, here
from scale.errors import ScaleError
from scale.sources import Source, expand
from scale.tree import FAN_IN, Tree, rounds
from tests.scale.traces import content, job, reducing, write


def follow() -> Progress:
    return Progress(0, 0)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 65, 600])
def test_a_tree_loses_nothing_and_holds_little(count: int) -> None:
    most = 0

    def combine(parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        assert 2 <= len(parts) <= FAN_IN
        return tuple(itertools.chain(*parts))

    taken: list[tuple[int, ...]] = []
    tree = Tree(combine, top=2, out=taken.append)
    for number in range(count):
        tree.add((number,))
        most = max(most, sum(map(len, tree._held)))
    rest = tree.close()
    assert sorted(itertools.chain(*taken, rest or ())) == list(range(count))
    assert {len(part) for part in taken} <= {FAN_IN**2} and most < 2 * FAN_IN
    assert rounds(combine, [(number,) for number in range(count)]) == [tuple(range(count))]


def test_of_nothing_comes_nothing() -> None:
    assert Tree[int](sum).close() is None and rounds(sum, []) == []


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Ten of them, one twice."""
    folder = tmp_path_factory.mktemp("traces")
    for number in range(9):
        write(folder / f"{number}.parquet", number)
    return expand([f"{folder}/*.parquet", f"{folder}/3.parquet"])


def test_the_tree_adds_up_to_what_one_merge_does(traces: list[Source]) -> None:
    made = reducing(SPANS, By(pc=True))
    following = follow()
    found = here(job(made), traces, following)
    assert content(found) == content(merge([made(source) for source in traces]))
    assert (following.files_done, following.records) == (10, 30_000)


def test_a_run_that_was_broken_off_goes_on(traces: list[Source], tmp_path: Path) -> None:
    made, read = reducing(), list[str]()

    class Breaking:
        def __call__(self, source: Source, piece: groups.Piece | None = None) -> Footprint:
            read.append(source.name)
            if len(read) == 5:
                raise ScaleError(f"{source.name}: is no trace")
            return made(source, piece)

    breaking = job(made, tmp_path / "kept")
    with pytest.raises(ScaleError, match="is no trace"):
        here(type(breaking)(Breaking(), *_rest(breaking)), traces, follow())
    assert len(list((tmp_path / "kept").iterdir())) == 4
    following = follow()
    found = here(type(breaking)(Breaking(), *_rest(breaking)), traces, following)
    assert content(found) == content(here(job(made), traces, follow()))
    assert following.found == 5 and len(read) == 10  # the one that is twice there is read once
    assert breaking.kept is not None
    breaking.kept.clear()
    assert not (tmp_path / "kept").exists()


def _rest(one: object) -> list[object]:
    return [getattr(one, name) for name in ("level", "by", "how", "partials")]


def test_partials_are_of_what_their_names_say(traces: list[Source], tmp_path: Path) -> None:
    made, other = reducing(), reducing(BYTES)
    two = traces[:2]
    here(job(made, tmp_path), two, follow())
    here(job(other, tmp_path), two, follow())
    here(job(reducing(SPANS, By(records=100)), tmp_path), two, follow())
    assert len(list(tmp_path.iterdir())) == 6
    name = job(made).name(two[0])
    (tmp_path / job(other).name(two[0])).rename(tmp_path / name)
    with pytest.raises(ScaleError) as refusal:
        here(job(made, tmp_path), two, follow())
    assert str(refusal.value).startswith(f"{tmp_path}/{name}: is of bytes by ")
    assert str(refusal.value).endswith("are wanted. Delete it, and it is made again")
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(ScaleError, match=f"{name}: is damaged: "):
        here(job(made, tmp_path), two, follow())
    (tmp_path / name).unlink()
    (tmp_path / "notes").write_text("of somebody")
    assert content(here(job(made, tmp_path), two, follow())) == content(here(job(made), two, follow()))
    kept = job(made, tmp_path).kept
    assert kept is not None
    kept.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_folders_above_are_not_made(traces: list[Source], tmp_path: Path) -> None:
    with pytest.raises(ScaleError, match="not/there: no folder for partial results can be made there: "):
        here(job(reducing(), tmp_path / "not" / "there"), traces, follow())
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "one.parquet", 1)
    (before,) = expand([str(path)])
    here(job(reducing(), tmp_path / "kept"), [before], follow())
    write(path, 2)
    (after,) = expand([str(path)])
    following = follow()
    found = here(job(reducing(), tmp_path / "kept"), [after], following)
    assert following.found == 0 and content(found) == content(reducing()(after))


def test_nothing_is_kept_of_a_file_that_changed_under_way(tmp_path: Path) -> None:
    (source,) = expand([str(write(tmp_path / "one.parquet", 1))])
    with pytest.raises(ScaleError, match="has changed since it was found"):
        here(job(reducing(), tmp_path / "kept"), [source._replace(changed=7)], follow())
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize("by", [By(), By(records=700, pc=True), By(time=10_000)], ids=str)
@pytest.mark.parametrize("level", [SPANS, BYTES])
def test_pieces_of_a_file_come_to_the_file(tmp_path: Path, level: str, by: By) -> None:
    (source,) = expand([str(write(tmp_path / "large.parquet", 5, groups=9))])
    pieces = groups.pieces_of(source, source.size // 4)
    assert len(pieces) > 2 and pieces[0].record == 0 and pieces[-1].end == 9
    made = reducing(level, by)
    parts = [made(source, piece) for piece in pieces]
    (one,) = rounds(groups.one_of, parts)
    assert content(groups.finished(one, groups.whole_of(source))) == content(made(source))


def test_files_that_cannot_be_taken_apart_are_read_whole(tmp_path: Path) -> None:
    (tmp_path / "text.log").write_text(" S 1000,8\n" * 1000)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" * 400)
    write(tmp_path / "one.parquet", 1, groups=1)
    for source in expand([f"{tmp_path}/*"]):
        assert groups.pieces_of(source, 100) == []


def test_what_is_wrong_in_a_piece_is_told_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "large.parquet", 5, groups=9)
    (source,) = expand([str(path)])
    piece = groups.pieces_of(source, source.size // 4)[1]
    data = bytearray(path.read_bytes())
    data[source.size // 8 : source.size * 7 // 8] = bytes(source.size * 7 // 8 - source.size // 8)
    path.write_bytes(data)
    with pytest.raises(ScaleError, match=rf"large\.parquet, counted from record {piece.record:,}: "):
        reducing()(source, piece)
