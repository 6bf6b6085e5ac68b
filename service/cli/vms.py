"""``subpage vm``: the machines of a running service, asked over HTTP like any client does."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.commands import Command
from service.platform.failures import Failure, FileError, opened

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


class Unanswered(Failure):
    """The service cannot be reached, or refused; the text says why."""


class Client:
    """One service. Use as a context manager. Raises FileError for a file of authorities that has none."""

    def __init__(self, url: str, token: str | None, authorities: Path | None = None) -> None:
        import httpx2

        self._failures = (httpx2.HTTPError, httpx2.InvalidURL)
        self._url = url
        headers = {"Accept": "application/json"}
        if token:
            if not token.isascii() or not token.isprintable():
                raise Unanswered("a token has printable ASCII characters, and the one that was given has others")
            headers["Authorization"] = f"Bearer {token}"
        verify = _trusting(authorities) if authorities else True
        try:
            self._client = httpx2.Client(base_url=url, headers=headers, timeout=_TIMEOUT, verify=verify)
        except self._failures as error:
            raise Unanswered(f"--url {url}: {error}") from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._client.close()

    def get(self, path: str) -> dict[str, Any]:
        """The document at ``path``. Raises Unanswered."""
        reply = self._answered("GET", path)
        return self._document(reply.status_code, reply.content)

    def call(self, method: str, path: str, document: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the service answers, ``{}`` where that is nothing. Raises Unanswered."""
        return self._taken(self._answered(method, path, json=document))

    def upload(self, path: str, query: dict[str, str], content: Iterator[bytes], coding: str) -> dict[str, Any]:
        """PUT bytes as they come, however long the service then takes with them. Raises Unanswered."""
        import httpx2

        headers = {"Content-Type": "application/octet-stream", "Content-Encoding": coding}
        limits = httpx2.Timeout(_TIMEOUT, read=None)
        return self._taken(self._answered("PUT", path, params=query, content=content, headers=headers, timeout=limits))

    def send(self, method: str, path: str, query: dict[str, str], content: Any, media: str) -> dict[str, Any]:
        """What the service answers to bytes, or to what iterates over them however long it takes. Raises Unanswered."""
        import httpx2

        limits = httpx2.Timeout(_TIMEOUT, read=None, write=None)
        headers = {"Content-Type": media}
        return self._taken(self._answered(method, path, params=query, content=content, headers=headers, timeout=limits))

    def _taken(self, reply: Any) -> dict[str, Any]:
        return self._document(reply.status_code, reply.content) if reply.content else {}

    def _answered(self, method: str, path: str, **options: Any) -> Any:
        """The reply of a service that did what it was asked for."""
        try:
            reply = self._client.request(method, path, **options)
        except self._failures as error:
            raise Unanswered(unreached(self._url, error)) from None
        if not reply.is_success:
            raise Unanswered(self._refused(reply.status_code, reply.content))
        return reply

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
                content = reply.read()
        except self._failures as error:
            raise broken(unreached(self._url, error)) from None
        refused = self._refused(reply.status_code, content)
        raise (broken if reply.status_code in (429, 503) else Unanswered)(refused)

    def _refused(self, status: int, content: bytes) -> str:
        said = f"{status}: {self._document(status, content).get('detail', 'no reason given')}"
        return f"{said}; --token or SUBPAGE_TOKEN gives one" if status == 401 else said

    def _document(self, status: int, content: bytes) -> dict[str, Any]:
        """What the service says; others say other things."""
        try:
            document = json.loads(content)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise Unanswered(f"{self._url} answers {status}, and not as Subpage does: say with --url where that is")
        return document

    def machines(self) -> Iterator[dict[str, Any]]:
        """Every machine that the token may see."""
        path: str | None = "/v1/vms"
        while path:
            page = self.get(path)
            if not isinstance(page.get("vms"), list):
                raise Unanswered(f"{self._url} is not a service of Subpage: say with --url where that is")
            yield from page["vms"]
            path = page["next"]


def _size(slots: list[dict[str, Any]]) -> str:
    total = sum(int(slot["size"], 16) for slot in slots)
    for unit, shift in (("GiB", 30), ("MiB", 20)):
        if total >= 1 << shift:
            return f"{total / (1 << shift):.4g} {unit}"
    return f"{total >> 10} KiB"


def _trusting(authorities: Path) -> ssl.SSLContext:
    """TLS with servers that these vouch for."""
    with opened(authorities):
        pass
    try:
        return ssl.create_default_context(cafile=authorities)
    except ssl.SSLError:
        raise FileError(f"{authorities}: has no certificates in PEM form") from None


def unreached(url: str, error: Exception) -> str:
    """Why there is no answer from ``url``, and what to do."""
    import httpx2

    text = str(error)
    if isinstance(error, httpx2.ConnectError):
        if "CERTIFICATE_VERIFY_FAILED" in text:
            return f"the certificate of {url} is not trusted: --ca names the authority that vouches for it"
        if "SSL" in text:
            return f"{url} does not speak TLS as it should; perhaps it is http, not https"
        if "Errno -" in text:
            return f"there is no host of the name in {url}"
        return f"no service on {url}: start one with `subpage serve`, or say with --url where it is"
    if isinstance(error, (httpx2.InvalidURL, httpx2.UnsupportedProtocol)):
        return f"--url {url}: must be a URL such as {HERE}"
    if isinstance(error, httpx2.TimeoutException):
        return f"{url} does not answer: is it the service, and is it well?"
    if isinstance(error, httpx2.RemoteProtocolError):
        return f"{url} ended the connection, or does not speak HTTP ({text})"
    return f"{url}: {text}"


def complete(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Ids for the shell; none where the service does not answer."""
    options = context.params
    try:
        with Client(options.get("url") or HERE, options.get("token"), options.get("authorities")) as client:
            found = [(vm["id"], vm["name"]) for vm in client.machines()]
    except Failure:
        return []
    return [item for item in found if item[0].startswith(incomplete)]


@vms.command("list", cls=Command)
def list_(url: Url = HERE, token: Token = None, authorities: Authorities = None, as_json: AsJson = False) -> None:
    """List the machines: id, creation, memory, whether SPP is enabled, profile, name."""
    with Client(url, token, authorities) as client:
        found = list(client.machines())
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    row = "{:<20}  {:<20}  {:>10}  {:<3}  {:<10}  {}"
    typer.echo(row.format("ID", "CREATED", "MEMORY", "SPP", "PROFILE", "NAME"))
    for vm in found:
        spp, created = "yes" if vm["spp"] else "no", vm["created"][:19].replace("T", " ") + "Z"
        typer.echo(row.format(vm["id"], created, _size(vm["memory_slots"]), spp, vm["profile"], vm["name"]))


@vms.command(cls=Command)
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
    with Client(url, token, authorities) as client:
        found = client.get(path)
        counters = client.get(f"{path}/counters")["counters"]
    if as_json:
        typer.echo(json.dumps({**found, "counters": counters}, indent=1))
        return
    lines = {name: found[name] for name in ("id", "name", "profile", "maxphyaddr", "spp", "created", "revision")}
    lines |= {"vcpus": len(found["vcpus"]), "memory": _size(found["memory_slots"])}
    lines |= {name: count for name, count in counters.items() if count}
    width = max(map(len, lines))
    for name, value in lines.items():
        typer.echo(f"{name:<{width}}  {value}")
