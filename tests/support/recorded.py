"""The recorded traces, their policies and the answers: some come with the package, for the demonstration."""

from __future__ import annotations

from pathlib import Path

from service.cli.demo import DATA as PACKAGED

DATA = Path(__file__).parents[1] / "data"
TRUTH = DATA / "ground-truth.json"


def trace(name: str) -> Path:
    """``boot`` or ``user``."""
    return _found(f"traces/{name}.parquet")


def policy(name: str) -> Path:
    return _found(f"policies/{name}.json")


def _found(name: str) -> Path:
    return next(path / name for path in (PACKAGED, DATA) if (path / name).exists())
