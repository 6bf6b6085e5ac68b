"""One browser for all tests of the console, and a service for each module; neither where there is no Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from service.settings import Settings
from tests.support.server import Running, running

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.console.chromium import Visit


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    from tests.console.chromium import found, launched

    if found() is None:
        pytest.skip("needs chromium: apt-get install chromium, or say where it is in SUBPAGE_CHROMIUM")
    with playwright.sync_playwright() as started:
        chromium = launched(started)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running(Settings(warm_up=False, max_vms=1200)) as started:
        yield started


@pytest.fixture
def visit(browser: Browser, service: Running) -> Iterator[Visit]:
    from tests.console.chromium import visiting

    with visiting(browser, service.url) as started:
        yield started
