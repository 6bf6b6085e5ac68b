"""Whose a machine is outlives the process, and tokens are in the store beside it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.backups.offline import backup, restore
from service.cli.app import app
from service.security.stored_tokens import StoredTokens
from service.security.tokens import TokensUnavailable, mint
from service.storage.urls import StoreUrl
from tests.support.http import new_vm
from tests.support.stores import run_sql, serving
from tests.support.waiting import until


def tenants_tokens(url: str) -> dict[str, dict[str, str]]:
    """A writing token for each of two tenants, as headers."""
    store = StoredTokens(StoreUrl.parse(url))
    made = {}
    for tenant in ("red", "blue"):
        record, token = mint(tenant, tenant=tenant, scope="write", now=datetime.now(UTC))
        store.add(record)
        made[tenant] = {"Authorization": f"Bearer {token}"}
    return made


def test_tenants_outlive_the_process(store_url: str, tmp_path: Path) -> None:
    headers = tenants_tokens(store_url)
    with serving(store_url) as service:
        assert service.client.get("/v1/vms").status_code == 401
        made = {}
        for tenant, own in headers.items():
            made[tenant] = service.client.post("/v1/vms", json={"name": tenant}, headers=own).json()["id"]
    archive = tmp_path / "all.backup"
    assert backup(StoreUrl.parse(store_url), archive, None) == 2
    other = f"sqlite:///{tmp_path}/other.db"
    assert restore(StoreUrl.parse(other), archive, None, replace=False) == list(made.values())
    other_headers = tenants_tokens(other)
    for url, given in ((store_url, headers), (other, other_headers)):
        with serving(url) as service:
            for tenant, own in given.items():
                listed = service.client.get("/v1/vms", headers=own).json()["vms"]
                assert [vm["id"] for vm in listed] == [made[tenant]] and listed[0]["name"] == tenant
                foreign = made["blue" if tenant == "red" else "red"]
                reply = service.client.get(f"/v1/vms/{foreign}", headers=own)
                assert reply.status_code == 404 and reply.json()["field"] == "vm"


def test_a_store_of_the_release_before(tmp_path: Path) -> None:
    """Machines that were made before there were tenants are the default tenant's."""
    url = f"sqlite:///{tmp_path}/old.db"
    with serving(url) as service:
        vm = new_vm(service.client)
    run_sql(
        url,
        "DROP TABLE events",
        "ALTER TABLE vms DROP COLUMN next_event",
        "DROP TABLE footprint_parts",
        "DROP TABLE footprints",
        "DROP TABLE answers",
        "DROP TABLE jobs",
        "DROP TABLE tokens",
        "ALTER TABLE vms DROP COLUMN tenant",
        "UPDATE alembic_version SET version_num = '0001'",
    )
    with serving(url) as service:
        assert service.client.get(vm).status_code == 200
        assert [item["id"] for item in service.client.get("/v1/vms").json()["vms"]] == [vm.rpartition("/")[2]]


def test_the_command_writes_beside_the_service(store_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SUBPAGE_STORE", store_url)
    runner = CliRunner()
    with serving(store_url, token_refresh=0.05) as service:
        assert service.client.get("/v1/vms").status_code == 200
        made = runner.invoke(app, ["token", "create", "tool", "--scope", "read"])
        assert made.exit_code == 0, made.output
        own = {"Authorization": f"Bearer {made.stdout.strip()}"}
        until(lambda: service.client.get("/v1/vms").status_code == 401)
        assert service.client.get("/v1/vms", headers=own).status_code == 200
        listed = runner.invoke(app, ["token", "list"]).stdout
        token = next(line.split()[0] for line in listed.splitlines() if line.endswith(" tool"))
        assert runner.invoke(app, ["token", "revoke", token]).exit_code == 0
        until(lambda: service.client.get("/v1/vms", headers=own).status_code == 401)
    assert "valid" not in runner.invoke(app, ["token", "list"]).stdout


def test_a_store_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.db").write_bytes(b"this is no database" * 1000)
    url = f"sqlite:///{tmp_path}/x.db"
    store = StoredTokens(StoreUrl.parse(url))
    for call in (store.all, lambda: store.revoke("0", datetime.now(UTC))):
        with pytest.raises(TokensUnavailable, match="not a database"):
            call()
    monkeypatch.setenv("SUBPAGE_STORE", url)
    for arguments in (["token", "list"], ["token", "create", "x"], ["token", "revoke", "x"]):
        told = CliRunner().invoke(app, arguments)
        assert told.exit_code == 1 and "not a database" in told.output
    told = CliRunner().invoke(app, ["serve", "--host", "0.0.0.0"])
    assert told.exit_code == 2 and "tokens cannot be read" in told.output


def test_passwords_of_stores_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBPAGE_STORE", "postgresql://subpage:hunter2@db.example/subpage")
    printed = CliRunner().invoke(app, ["config"]).stdout
    (line,) = [line for line in printed.splitlines() if line.startswith("store = ")]
    assert "hunter2" not in printed and json.loads(line.partition(" = ")[2].partition("  # ")[0]).count("(hidden)") == 1
