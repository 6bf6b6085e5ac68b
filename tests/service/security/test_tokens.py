"""Tokens: their form, their stores, the decision."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.problems import Forbidden, RateLimited, Unauthenticated
from service.security.access import LOCAL_ADMIN, NOBODY, AccessControl, Permission, Principal, is_loopback
from service.security.stored_tokens import StoredTokens
from service.security.tokens import FileTokens, MemoryTokens, TokenStore, digest_of, mint, split
from service.settings import Settings
from service.storage.urls import StoreUrl

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)


@dataclass
class Clock:
    now: datetime = NOW
    seconds: float = 0.0
    given: list[str] = field(default_factory=list)


@pytest.fixture(params=["memory", "file", "store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> TokenStore:
    if request.param == "memory":
        return MemoryTokens()
    if request.param == "file":
        return FileTokens(tmp_path / "tokens.db")
    return StoredTokens(StoreUrl.parse(f"sqlite:///{tmp_path / 'deep' / 'subpage.db'}"))


def control(store: TokenStore | None, clock: Clock | None = None, **settings: object) -> AccessControl:
    clock = clock or Clock()
    access = AccessControl(
        Settings(**settings),  # type: ignore[arg-type]
        store,
        clock=lambda: clock.now,
        monotonic=lambda: clock.seconds,
    )
    access.load()
    return access


def admit(access: AccessControl, permission: Permission, token: str | None, scheme: str = "Bearer") -> Principal:
    given = f"{scheme} {token}".encode() if token is not None else None
    return access.authorize({}, permission, given, b"example.org")


def test_a_token_and_its_record(store: TokenStore) -> None:
    assert store.all() == []
    record, token = mint("scanner", tenant="red", scope="write", now=NOW, expires=LATER)
    assert split(token) == (record.id, token[16:]) and token.startswith(f"sp_{record.id}_")
    assert record.proves(token[16:]) and not record.proves(token[16:-1] + "x" * (token[-1] != "x") + "yy")
    store.add(record)
    assert store.all() == [record]
    assert store.revoke(record.id, LATER) and store.revoke(record.id, LATER + timedelta(1))
    assert store.all()[0].revoked == LATER
    assert not store.revoke("0" * 12, NOW)


def test_the_secret_is_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "tokens.db"
    record, token = mint("scanner", now=NOW)
    FileTokens(file).add(record)
    content = file.read_bytes()
    assert digest_of(token[16:]) in content and token[16:].encode() not in content
    assert file.stat().st_mode & 0o777 == 0o600


def test_two_stores_on_one_file(tmp_path: Path) -> None:
    one, two = FileTokens(tmp_path / "t.db"), FileTokens(tmp_path / "t.db")
    record, _ = mint("a", now=NOW)
    one.add(record)
    assert two.all() == [record]
    with pytest.raises(sqlite3.IntegrityError):
        two.add(record)


@pytest.mark.parametrize(
    "members",
    [
        {"tenant": ""},
        {"tenant": "Upper"},
        {"tenant": "-x"},
        {"tenant": "a" * 64},
        {"scope": "root"},
        {"scope": "public"},
        {"expires": NOW},
        {"name": "x" * 201},
    ],
)
def test_records_that_are_refused(members: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"a (tenant|scope|token|name) "):
        mint(**{"name": "n", "now": NOW, **members})  # type: ignore[arg-type]


def test_without_tokens_this_machine_needs_none() -> None:
    access = control(MemoryTokens())
    assert not access.guarded and not access.usable
    for host in (None, b"localhost", b"localhost:8000", b"127.0.0.1", b"127.8.9.1:80", b"[::1]:8000"):
        assert access.authorize({}, "admin", None, host) is LOCAL_ADMIN
    for host in (b"example.org", b"example.org:8000", b"", b"[", b"localhost.example.org", b"10.0.0.1"):
        with pytest.raises(Forbidden):
            access.authorize({}, "read", None, host)
    assert access.authorize({}, "public", None, b"example.org") is NOBODY


@pytest.mark.parametrize(
    ("scope", "allowed"),
    [
        ("read", {"public", "read"}),
        ("write", {"public", "read", "write"}),
        ("admin", {"public", "read", "write", "admin"}),
    ],
)
def test_scopes(scope: str, allowed: set[str]) -> None:
    record, token = mint("n", scope=scope, now=NOW)  # type: ignore[arg-type]
    access = control(MemoryTokens([record]))
    needed: Permission
    for needed in ("public", "read", "write", "admin"):
        if needed in allowed:
            assert admit(access, needed, token).tenant == "default"
        else:
            with pytest.raises(Forbidden) as caught:
                admit(access, needed, token)
            assert f'scope="{needed}"' in caught.value.headers["WWW-Authenticate"]  # type: ignore[index]


def test_what_is_no_token() -> None:
    record, token = mint("n", now=NOW)
    other, foreign = mint("n", now=NOW)
    access = control(MemoryTokens([record]))
    swapped = f"sp_{record.id}_{foreign[16:]}"
    for given in (
        None,
        "",
        "x",
        token[:-1],
        token + "x",
        swapped,
        foreign,
        "sp_" + "0" * 12,
        f"{token} {token}",
        "\xff",
    ):
        with pytest.raises(Unauthenticated):
            admit(access, "read", given)
    with pytest.raises(Unauthenticated):
        admit(access, "read", token, "Basic")
    for scheme in ("bearer", "BEARER", "Bearer "):
        assert admit(access, "read", token, scheme).token == record.id
    assert other.id != record.id


def test_expiry_and_revocation() -> None:
    clock = Clock()
    store = MemoryTokens()
    record, token = mint("n", now=NOW, expires=LATER)
    store.add(record)
    access = control(store, clock)
    assert admit(access, "read", token) and access.usable
    clock.now = LATER
    with pytest.raises(Unauthenticated):
        admit(access, "read", token)
    assert access.guarded and not access.usable
    clock.now = NOW
    assert admit(access, "read", token)
    store.revoke(record.id, NOW)
    access.load()
    with pytest.raises(Unauthenticated):
        admit(access, "read", token)
    assert access.guarded, "revoking the last token must not open the service"


def test_the_fixed_token() -> None:
    secret = "s" * 32
    access = control(None, token=SecretStr(secret))
    assert access.guarded and access.usable
    assert admit(access, "admin", secret).tenant == "default"
    with pytest.raises(Unauthenticated):
        admit(access, "read", secret + "s")


def test_the_rate_of_one_token() -> None:
    clock = Clock()
    (one, a), (two, b) = mint("a", now=NOW), mint("b", now=NOW)
    access = control(MemoryTokens([one, two]), clock, rate_limit=2, rate_burst=3)
    for _ in range(3):
        admit(access, "read", a)
    with pytest.raises(RateLimited) as caught:
        admit(access, "read", a)
    assert caught.value.field == "rate_limit" and "2 requests a second" in caught.value.rule
    assert caught.value.headers == {"Retry-After": "1"}
    admit(access, "read", b)
    access.load()
    with pytest.raises(RateLimited):
        admit(access, "read", a)
    clock.seconds = 0.5
    admit(access, "read", a)
    with pytest.raises(RateLimited):
        admit(access, "read", a)
    clock.seconds = 1000
    for _ in range(3):
        admit(access, "read", a)
    with pytest.raises(RateLimited):
        admit(access, "read", a)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
