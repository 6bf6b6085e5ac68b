"""Empty stores of both kinds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.postgres import MISSING, Cluster, binaries, cluster

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """One server for the session."""
    if binaries() is None:
        pytest.skip(MISSING)
    with cluster() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a store that does not exist yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/folder/subpage.db"
    server: Cluster = request.getfixturevalue("postgres")
    name = f"store_{next(_NUMBERS)}"
    server.sql(f"CREATE DATABASE {name}", database="postgres")
    return server.url.rpartition("/")[0] + "/" + name
