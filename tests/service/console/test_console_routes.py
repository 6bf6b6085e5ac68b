"""What `GET /` answers to people and to programs, and under which policy the console's files run."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from service.console.routes import FILES, INDEX
from tests.contract.client import ContractClient
from tests.support.recorded import policy, trace

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
STATIC = Path(__file__).parents[3] / "service" / "console" / "static"
SCRIPTS = sorted(path for path in STATIC.rglob("*.js") if "vendor" not in path.parts)


def test_browsers_get_the_console(client: ContractClient) -> None:
    page = client.get("/", headers={"Accept": BROWSER})
    assert page.status_code == 200 and page.headers["Content-Type"].startswith("text/html")
    assert "Accept" in page.headers["Vary"]
    rules = dict(rule.split(" ", 1) for rule in page.headers["Content-Security-Policy"].split("; "))
    assert rules["default-src"] == "'none'" and "unsafe" not in page.headers["Content-Security-Policy"]
    assert all(sources in ("'self'", "'none'", "'script'") for sources in rules.values())
    assert rules["require-trusted-types-for"] == "'script'"
    # Neither scripts nor styles within the page, and nothing from elsewhere.
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)|https?:", page.text)
    for url in re.findall(r'(?:src|href)="(/console/[^"]+)"', page.text):
        assert client.get(url).status_code == 200, url


@pytest.mark.parametrize("accept", [None, "*/*", "application/json", "application/*", "text/html;q=0.1, */*"])
def test_programs_get_an_index(client: ContractClient, accept: str | None) -> None:
    reply = client.get("/", headers={"Accept": accept} if accept else {"Accept": ""})
    assert reply.headers["Content-Type"] == "application/json" and reply.json() == INDEX
    assert "Accept" in reply.headers["Vary"]


def test_what_the_index_names_is_there(client: ContractClient) -> None:
    for name, path in INDEX.items():
        if path.startswith("/") and name != "console":
            assert client.get(path).status_code in (200, 503), name


def test_neither_is_wanted(client: ContractClient) -> None:
    assert client.get("/", headers={"Accept": "image/png"}).status_code == 406


def test_an_unchanged_page_is_not_sent_again(client: ContractClient) -> None:
    tag = client.get("/", headers={"Accept": BROWSER}).headers["ETag"]
    assert client.get("/", headers={"Accept": BROWSER, "If-None-Match": tag}).status_code == 304


@pytest.mark.parametrize("name", ["", "nothing.js", "../routes.py", "..%2froutes.py", "views", "views/", "/app.js"])
def test_only_its_files_can_be_had(client: ContractClient, name: str) -> None:
    assert client.get(f"/console/{name}").status_code == 404


@pytest.mark.parametrize(
    ("name", "media"),
    [
        ("app.js", "text/javascript"),
        ("views/map.js", "text/javascript"),
        ("console.css", "text/css"),
        ("icon.svg", "image/svg+xml"),
        ("samples/kernel_control_data.json", "application/json"),
        ("samples/boot.parquet", "application/vnd.apache.parquet"),
        ("vendor/uplot/LICENSE", "text/plain"),
    ],
)
def test_files_are_what_they_say(client: ContractClient, name: str, media: str) -> None:
    reply = client.get(f"/console/{name}")
    assert reply.headers["Content-Type"].partition(";")[0] == media
    assert reply.headers["X-Content-Type-Options"] == "nosniff"


def test_the_samples_are_those_of_the_demonstration(client: ContractClient) -> None:
    assert client.get("/console/samples/boot.parquet").content == trace("boot").read_bytes()
    sample = client.get("/console/samples/kernel_control_data.json").content
    assert sample == policy("kernel_control_data").read_bytes()


def test_its_weight() -> None:
    weight = sum(
        len(gzip.compress(path.read_bytes()))
        for name, path in FILES.files().items()
        if not name.startswith("samples/") and path.name != "LICENSE"
    )
    assert weight <= 150_000, f"{weight} bytes"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_turns_text_into_markup_or_calls_elsewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser", text
    )
    assert not re.search(r"(?:document\.cookie|sessionStorage|indexedDB)", text)
    assert set(re.findall(r"https?://[^\"'` ]+", text)) <= {"http://www.w3.org/2000/svg"}


def test_the_licence_of_the_chart_comes_along() -> None:
    assert "MIT License" in (STATIC / "vendor" / "uplot" / "LICENSE").read_text(encoding="utf-8")
