"""Where a cluster is said to be: what is told when it is not there, or when Ray itself is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scale import cluster
from scale.errors import ScaleError
from service.cli.app import app
from tests.scale.traces import write


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is left behind."""
    monkeypatch.setitem(sys.modules, "ray", None)
    trace = write(tmp_path / "one.parquet", 1)
    result = CliRunner().invoke(app, ["footprint", "build", str(trace), "--ray", "auto", "-o", str(tmp_path / "f")])
    assert result.exit_code == 1
    assert "subpage footprint build: --ray auto: Ray is not installed: `pip install 'subpage[scale]'`" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["one.parquet"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:1", "no cluster of Ray answers there: [Errno 111] Connection refused"),
        ("ray://127.0.0.1:1", "no cluster of Ray answers there: "),
        ("[::1]:1", "no cluster of Ray answers there: "),
        ("127.0.0.1:99999", "no cluster of Ray answers there: "),
        ("nowhere", "must be local, auto, HOST:PORT or ray://HOST:PORT"),
        ("http://127.0.0.1:1", "must be local, auto, HOST:PORT or ray://HOST:PORT"),
        ("", "must be local, auto, HOST:PORT or ray://HOST:PORT"),
    ],
)
def test_where_nothing_listens_that_is_told_at_once(address: str, said: str) -> None:
    with pytest.raises(ScaleError) as refusal:
        cluster.check_place(address)
    assert str(refusal.value).startswith(f"--ray {address}: {said}")
