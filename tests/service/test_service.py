"""The service itself: health, version, capabilities, documentation."""

from __future__ import annotations

import re
import threading

import pytest

from service import __version__, app
from service.settings import Settings
from tests.contract.client import ContractClient, contract
from tests.support.server import running


def test_health(client: ContractClient) -> None:
    assert client.get("/livez").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    assert client.get("/version").json()["version"] == __version__


def test_not_ready_while_kernels_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(app, "load_kernels", lambda group: go_on.wait(30))
    with running(Settings(warm_up=True)) as service:
        reply = service.client.get("/readyz")
        assert reply.status_code == 503 and reply.json()["code"] == "not-ready" and reply.headers["Retry-After"]
        assert service.client.get("/livez").status_code == 200
        go_on.set()
        while service.client.get("/readyz").status_code != 200:
            pass


def test_never_ready_without_kernels(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(app, "load_kernels", lambda group: 1 / 0)
    with running(Settings(warm_up=True)) as service:
        while "cannot be loaded" not in caplog.text:
            assert service.client.get("/readyz").status_code == 503
        assert service.client.get("/readyz").status_code == 503


def test_it_stops_while_it_warms_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "load_kernels", lambda group: None)
    with running(Settings(warm_up=True)):
        pass


def test_capabilities(client: ContractClient) -> None:
    reply = client.get("/v1/capabilities")
    found = reply.json()
    assert {"gpa", "kind", "linear", "source"} <= set(found["columns"]) and found["reserved_columns"] == []
    assert {"op", "arg", "address_space"} <= set(found["columns"])
    spp = found["spp"]
    profiles = spp.pop("profiles")
    assert spp == {
        "msr": "0x48b",
        "msr_bit": 55,
        "secondary_control": "0x800000",
        "vmcs_field": "0x2030",
        "ept_leaf_bit": 61,
        "subpage_bytes": 128,
    }
    assert {name: (row["capability"], row["max_pages"], row["exit_spp"]) for name, row in profiles.items()} == {
        "kvm-2019": (None, 64, 28),
        "kvm-latest": (182, 512, 29),
    }
    assert "application/vnd.apache.parquet" in found["trace_content_types"]
    assert found["limits"]["max_vms"] == 64
    assert client.get("/v1/capabilities", headers={"If-None-Match": reply.headers["ETag"]}).status_code == 304


def test_capabilities_list_what_the_calls_take(client: ContractClient) -> None:
    """Each list that stands for a choice of a call has what the contract lets that call take."""
    found = client.get("/v1/capabilities").json()
    paths, schemas = contract().document["paths"], contract().document["components"]["schemas"]
    post = paths["/v1/vms/{vm}/traces"]["post"]
    [choice] = [item["schema"] for item in post["parameters"] if item["name"] == "on_violation"]
    assert found["on_violation"] == choice["enum"] and "ask" in choice["enum"]
    [layouts] = [item["schema"] for item in post["parameters"] if item["name"] == "record"]
    assert found["record_formats"] == next(part["enum"] for part in layouts["anyOf"] if "enum" in part)
    assert found["trace_content_types"] == list(post["requestBody"]["content"])
    members = schemas["VmRequest"]["properties"]
    assert found["profiles"] == members["profile"]["enum"]
    assert found["translation_caches"] == members["translation_cache"]["enum"]
    records = {*schemas["AccessRecord"]["properties"], *schemas["OperationRecord"]["properties"]}
    assert set(found["columns"]) == records and not set(found["reserved_columns"]) & records
    settings = Settings()
    assert found["limits"] == {name: getattr(settings, name) for name in found["limits"]}


def test_the_document_served_is_the_one_committed(client: ContractClient) -> None:
    assert client.get("/openapi.json").json() == contract().committed


def test_the_docs_page_needs_no_internet(client: ContractClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(linked) == 5 and all(url.startswith("/static/") for url in linked)
    # No script and no style within the page, so that its policy needs to allow none.
    policy = page.headers["Content-Security-Policy"]
    assert "unsafe" not in policy and "default-src 'self'" in policy
    assert not re.search(r"<style|style=|\son\w+=|<script>", page.text)
    for url in linked:
        assert client.get(url).status_code == 200
    assert "//" not in re.sub(r"<!--.*?-->|// .*", "", re.sub(r"https?://www\.w3\.org", "", page.text)).replace(
        "</", ""
    )
    assert client.get("/redoc").status_code == 404


def test_the_licence_of_swagger_ui_comes_along(client: ContractClient) -> None:
    assert "Apache License" in client.get("/static/swagger-ui/LICENSE").text
    assert "SmartBear" in client.get("/static/swagger-ui/NOTICE").text
