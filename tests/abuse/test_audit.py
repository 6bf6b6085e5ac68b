"""Strangers do not fill the disk: their lines are short, and after the first ones only counted."""

from __future__ import annotations

import json
from pathlib import Path

from service.security.audit import MAX_TEXT, STRANGER_SECONDS, STRANGERS_AT_ONCE, AuditLog
from tests.abuse.process import TOKEN, head, serving
from tests.support.http import new_vm

POSTS = 60


def test_posts_without_a_token_and_with_a_long_path(tmp_path: Path) -> None:
    file = tmp_path / "audit"
    path = "/v1/vms/" + "x" * 8_000 + "/traces"
    with serving(audit_log=file) as victim:
        sent = 0
        with victim.connect() as connection:
            for _ in range(POSTS):
                request = head("POST", path, None, "Content-Length: 0")
                connection.sendall(request)
                reply = b""
                while not reply.endswith(b"}"):
                    got = connection.recv(1 << 20)
                    assert got
                    reply += got
                assert reply.startswith(b"HTTP/1.1 4")
                sent += len(request)
        with victim.client() as client:
            assert client.post("/v1/vms", json={}, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 201
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert file.stat().st_size < 100_000 < sent
    strangers = [line for line in lines if line["event"] == "request" and line["token"] == ""]
    assert STRANGERS_AT_ONCE <= len(strangers) < STRANGERS_AT_ONCE + 10
    assert all(len(line["path"]) < MAX_TEXT + 50 for line in strangers)
    counted = [line for line in lines if line["event"] == "strangers-refused"]
    assert len(strangers) + sum(line["count"] for line in counted) == POSTS
    (made,) = [line for line in lines if line["event"] == "request" and line["token"]]
    assert lines.index(made) > lines.index(counted[0]), "what was counted is told before what comes after it"


def test_who_is_known_is_always_written_and_time_gives_strangers_lines_again(tmp_path: Path) -> None:
    now = 0.0
    log = AuditLog(str(tmp_path / "audit"), monotonic=lambda: now)
    for _ in range(STRANGERS_AT_ONCE + 5):
        log.refused_stranger(401, path="/")
    now += STRANGER_SECONDS
    log.refused_stranger(403, path="/again")
    log.refused_stranger(403, path="/counted")
    log.refused_stranger(401, path="/counted")
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert [line["event"] for line in lines[STRANGERS_AT_ONCE:]] == [
        "strangers-refused",
        "request",
        "strangers-refused",
    ]
    assert lines[STRANGERS_AT_ONCE]["statuses"] == {"401": 5} and lines[-1]["statuses"] == {"401": 1, "403": 1}
    assert lines[-1]["count"] == 2 and lines[-1]["since"] <= lines[-1]["time"]


def test_no_token_in_the_audit_log(tmp_path: Path) -> None:
    file = tmp_path / "audit"
    secret = "Zz0-" * 10 + "abc"
    with serving(audit_log=file) as victim, victim.client() as client:
        client.post(f"/v1/vms?token={TOKEN}&t=sp_0123456789ab_{secret}", json={})
        client.delete(f"/v1/vms/sp_0123456789ab_{secret}")
    text = file.read_text()
    assert text.count("sp_0123456789ab_(hidden)") == 2 and secret not in text and TOKEN not in text


def test_methods_that_a_path_does_not_have_are_written(tmp_path: Path) -> None:
    """Also where the path can be read, which is not written."""
    file = tmp_path / "audit"
    with serving(audit_log=file) as victim, victim.client() as client:
        vm = new_vm(client)
        assert client.post(f"{vm}/counters").status_code == client.post(vm).status_code == 405
        assert client.get(vm).status_code == 200
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["status"] for line in lines if line["event"] == "request"] == [201, 405, 405]
