"""``subpage vm``: the machines of a running service, asked over HTTP like any client does."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

vms = typer.Typer(help="Look at the machines of a running service.", no_args_is_help=True)

_TIMEOUT = 30.0

Url = Annotated[str, typer.Option("--url", envvar="SUBPAGE_URL", help="Where the service is.")]
Token = Annotated[
    str | None, typer.Option(envvar="SUBPAGE_TOKEN", help="A token, where the service needs one.", show_envvar=True)
]
Authorities = Annotated[
    Path | None, typer.Option("--ca", envvar="SUBPAGE_CA", help="PEM file of the authorities to trust for https.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print what the service answers.")]

HERE = "http://127.0.0.1:8000"


class Unanswered(Exception):
    """The service cannot be reached, or refused; the text says why."""


class Client:
    """One service. Use as a context manager."""

    def __init__(self, url: str, token: str | None, authorities: Path | None = None) -> None:
        import httpx2

        self._failure = httpx2.HTTPError
        headers = {"Accept": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        verify = ssl.create_default_context(cafile=authorities) if authorities else True
        self._client = httpx2.Client(base_url=url, headers=headers, timeout=_TIMEOUT, verify=verify)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._client.close()

    def get(self, path: str) -> Any:
        """The document at ``path``. Raises Unanswered."""
        try:
            reply = self._client.get(path)
            document = reply.json()
        except self._failure as error:
            raise Unanswered(f"{self._client.base_url}: {error}") from None
        except ValueError:
            raise Unanswered(f"{self._client.base_url}{path}: {reply.status_code}, and no JSON") from None
        if reply.status_code != 200:
            raise Unanswered(f"{reply.status_code}: {document.get('detail', document)}")
        return document

    def lines(self, path: str, query: dict[str, str], silence: float, broken: type[Exception]) -> Iterator[str]:
        """The lines of NDJSON at ``path`` as they come.

        Raises Unanswered when the service refuses, ``broken`` where coming again may help: it is not there or not
        ready, the connection broke, or nothing came for ``silence`` seconds.
        """
        import httpx2

        limits = httpx2.Timeout(_TIMEOUT, read=silence)
        accept = {"Accept": "application/x-ndjson"}
        try:
            with self._client.stream("GET", path, params=query, headers=accept, timeout=limits) as reply:
                if reply.status_code == 200:
                    yield from reply.iter_lines()
                    return
                document = json.loads(reply.read())
        except self._failure as error:
            raise broken(f"{self._client.base_url}: {error}") from None
        except ValueError:
            raise Unanswered(f"{self._client.base_url}{path}: {reply.status_code}, and no JSON") from None
        refused = f"{reply.status_code}: {document.get('detail', document)}"
        raise (broken if reply.status_code in (429, 503) else Unanswered)(refused)

    def machines(self) -> Iterator[dict[str, Any]]:
        """Every machine that the token may see."""
        path: str | None = "/v1/vms"
        while path:
            page = self.get(path)
            yield from page["vms"]
            path = page["next"]


def _size(slots: list[dict[str, Any]]) -> str:
    total = sum(int(slot["size"], 16) for slot in slots)
    for unit, shift in (("GiB", 30), ("MiB", 20)):
        if total >= 1 << shift:
            return f"{total / (1 << shift):.4g} {unit}"
    return f"{total >> 10} KiB"


def _failed(error: Exception) -> typer.Exit:
    typer.echo(f"subpage vm: {error}", err=True)
    return typer.Exit(1)


def complete(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Ids for the shell; none where the service does not answer."""
    options = context.params
    try:
        with Client(options.get("url") or HERE, options.get("token"), options.get("authorities")) as client:
            found = [(vm["id"], vm["name"]) for vm in client.machines()]
    except (Unanswered, OSError):
        return []
    return [item for item in found if item[0].startswith(incomplete)]


@vms.command("list")
def list_(url: Url = HERE, token: Token = None, authorities: Authorities = None, as_json: AsJson = False) -> None:
    """List the machines: id, creation, memory, whether SPP is enabled, profile, name."""
    try:
        with Client(url, token, authorities) as client:
            found = list(client.machines())
    except (Unanswered, OSError) as error:
        raise _failed(error) from None
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    row = "{:<20}  {:<20}  {:>10}  {:<3}  {:<10}  {}"
    typer.echo(row.format("ID", "CREATED", "MEMORY", "SPP", "PROFILE", "NAME"))
    for vm in found:
        spp, created = "yes" if vm["spp"] else "no", vm["created"][:19].replace("T", " ") + "Z"
        typer.echo(row.format(vm["id"], created, _size(vm["memory_slots"]), spp, vm["profile"], vm["name"]))


@vms.command()
def show(
    vm: Annotated[str, typer.Argument(help="Id of the machine.", autocompletion=complete)],
    url: Url = HERE,
    token: Token = None,
    authorities: Authorities = None,
    as_json: AsJson = False,
) -> None:
    """Show one machine and its counters."""
    from urllib.parse import quote

    path = f"/v1/vms/{quote(vm, safe='')}"
    try:
        with Client(url, token, authorities) as client:
            found = client.get(path)
            counters = client.get(f"{path}/counters")["counters"]
    except (Unanswered, OSError) as error:
        raise _failed(error) from None
    if as_json:
        typer.echo(json.dumps({**found, "counters": counters}, indent=1))
        return
    lines = {name: found[name] for name in ("id", "name", "profile", "maxphyaddr", "spp", "created", "revision")}
    lines |= {"vcpus": len(found["vcpus"]), "memory": _size(found["memory_slots"])}
    lines |= {name: count for name, count in counters.items() if count}
    width = max(map(len, lines))
    for name, value in lines.items():
        typer.echo(f"{name:<{width}}  {value}")
