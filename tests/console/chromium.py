"""The console in a real browser: Debian's Chromium, driven by Playwright, and what its tests do over and over."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, expect

PICTURES = Path(__file__).parents[2] / "build" / "console"
AXE = Path(__file__).parent / "axe" / "axe.min.js"
WIDE, NARROW = (1440, 900), (400, 800)

# Milliseconds: other tests may have the processor for long.
PATIENCE = 60_000
# Where a page stands still: nothing under way and nothing that turns.
SETTLED = 400


def found() -> str | None:
    """Where Chromium is; ``SUBPAGE_CHROMIUM`` may say it."""
    return os.environ.get("SUBPAGE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def launched(playwright: Playwright) -> Browser:
    # Root, as in CI and in containers, has no sandbox; the pages are ours.
    arguments = ["--disable-gpu", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    return playwright.chromium.launch(executable_path=found(), args=arguments)


@dataclass
class Visit:
    """A page of the console and everything that it said and fetched."""

    page: Page
    url: str
    said: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)

    def open(self, where: str = "/") -> Page:
        self.page.goto(f"{self.url}/#{where}")
        self.page.wait_for_selector("main .view > *, dialog[open]")
        return self.page

    def tab_to(self, name: str, most: int = 80) -> None:
        """Press Tab until what has the focus is called ``name``, a regular expression. AssertionError if nothing is."""
        seen = []
        for _ in range(most):
            self.page.keyboard.press("Tab")
            seen.append(self.focused())
            if re.search(name, seen[-1]):
                return
        raise AssertionError(f"nothing called {name} is reached by Tab: {seen}")

    def focused(self) -> str:
        """What a screen reader would say of what has the focus, about."""
        said: str = self.page.evaluate(
            """() => { const e = document.activeElement;
            return e.getAttribute("aria-label") ?? e.labels?.[0]?.textContent ?? e.textContent.slice(0, 80) ?? ""; }"""
        )
        return said


@contextmanager
def visiting(
    browser: Browser, url: str, size: tuple[int, int] = WIDE, *, dark: bool = False, axe: bool = False
) -> Iterator[Visit]:
    """A page of its own. At the end it must have logged no error, and asked nobody but the service.

    With ``axe`` the page's policy does not hold, since axe is a script that is not the page's own.
    """
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if dark else "light",
        bypass_csp=axe,
        reduced_motion="reduce",
    )
    context.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    visit = Visit(context.new_page(), url)

    def say(message: ConsoleMessage) -> None:
        # What a status code of 4xx or 5xx is answered with is the page's affair, which the tests look at.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            visit.said.append(message.text)

    visit.page.on("console", say)
    visit.page.on("pageerror", lambda error: visit.said.append(str(error)))
    visit.page.on("request", lambda request: visit.fetched.append(request.url))
    try:
        yield visit
        assert visit.said == []
        assert [one for one in visit.fetched if not one.startswith((url, url.replace("http", "ws", 1)))] == []
    finally:
        context.close()


def serious(page: Page, *rules: str) -> list[str]:
    """What axe finds wrong that is serious or worse, by ``rules`` or all of them: the rule, and the element."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    options = {"resultTypes": ["violations"], **({"runOnly": rules} if rules else {})}
    result: dict[str, Any] = page.evaluate("(options) => axe.run(document, options)", options)
    return [
        f"{violation['id']}: {violation['help']}: {node['html'][:160]} {node['failureSummary'][:200]}"
        for violation in result["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def picture(page: Page, name: str) -> None:
    """Keep what the page looks like, for people."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(PICTURES / f"{name}.png"))


def lines(records: list[dict[str, Any]]) -> bytes:
    """A trace as NDJSON."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()
