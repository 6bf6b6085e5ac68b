"""The service that a command speaks to: where it is, by which token, and what is said when that does not work."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import urlsplit

import typer

from service.cli.statuses import Status
from service.platform.failures import Failure, FileError, opened

if TYPE_CHECKING:
    import subpage

F = TypeVar("F", bound=Callable[..., None])

HERE = "http://127.0.0.1:8000"
TOKEN, TOKEN_PATH = "SUBPAGE_TOKEN", "SUBPAGE_TOKEN_PATH"
_PANEL = "Service"
_MOST_TOKEN_BYTES = 4096

_Server = Annotated[
    str,
    typer.Option(
        "--server",
        "--url",
        envvar=["SUBPAGE_SERVER", "SUBPAGE_URL"],
        show_envvar=False,
        help="Where the service is; SUBPAGE_SERVER.",
        rich_help_panel=_PANEL,
    ),
]
_Token = Annotated[
    str | None, typer.Option(help=f"A token, where the service needs one; {TOKEN}.", rich_help_panel=_PANEL)
]
_TokenPath = Annotated[
    Path | None, typer.Option("--token-file", help=f"File that has it; {TOKEN_PATH}.", rich_help_panel=_PANEL)
]
_Authorities = Annotated[
    Path | None,
    typer.Option(
        "--ca",
        envvar="SUBPAGE_CA",
        show_envvar=False,
        help="PEM file of authorities to trust; SUBPAGE_CA.",
        rich_help_panel=_PANEL,
    ),
]


class Unanswered(Failure):
    """The service was not reached, or refused; the text says why, ``status`` what kind that is."""

    def __init__(self, text: str, status: int = Status.FAILED) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Service:
    """A service as the command line names it."""

    url: str = HERE
    given: str | None = None
    token_path: Path | None = None
    authorities: Path | None = None

    @property
    def token(self) -> str | None:
        """What was given with the command, else what the environment has. Raises FileError."""
        if self.given is not None or self.token_path is not None:
            return self.given if self.given is not None else _read(self.token_path)
        if found := os.environ.get(TOKEN):
            return found
        return _read(Path(path)) if (path := os.environ.get(TOKEN_PATH)) else None

    @contextmanager
    def client(self, **options: Any) -> Iterator[subpage.Client]:
        """A client of it. What it raises becomes a Failure, with what to do about it."""
        import subpage

        _check(self.url)
        if self.authorities is not None:
            opened(self.authorities).close()
        with warnings.catch_warnings():
            warnings.simplefilter("always", subpage.VersionMismatch)
            warnings.showwarning = _warn  # type: ignore[assignment]
            try:
                with subpage.Client(self.url, self.token, ca=self.authorities, **options) as client:
                    yield client
            except subpage.Error as error:
                raise failure_of(error) from None


def failure_of(error: Exception) -> Failure:
    """What a command says of what the client raised."""
    import subpage

    text = str(error)
    match error:
        case subpage.Unauthenticated():
            hint = f"--token-file or {TOKEN} gives one, `subpage token create` makes one"
            return Unanswered(f"{error.status}: {error.detail}; {hint}", Status.NOT_ALLOWED)
        case subpage.Forbidden():
            return Unanswered(f"{error.status}: {error.detail}", Status.NOT_ALLOWED)
        case subpage.Problem():
            status = Status.NOT_FOUND if error.status == 404 else Status.FAILED
            where = f"record {error.index}: " if error.index is not None else ""
            return Unanswered(f"{error.status}: {where}{error.detail}", status)
        case subpage.Unreachable() | subpage.StreamBroken() | subpage.NotSubpage():
            return Unanswered(text, Status.NO_SERVICE)
        case _:
            return Unanswered(text)


def _check(url: str) -> None:
    """Raises Unanswered for what is no URL."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise Unanswered(f"--server {url}: must be a URL such as {HERE}", Status.USAGE)


def _read(path: Path | None) -> str:
    """The token in a file: its first line."""
    assert path is not None
    with opened(path) as file:
        text = file.read(_MOST_TOKEN_BYTES + 1)
    lines = text.decode("ascii", "replace").split()
    if len(text) > _MOST_TOKEN_BYTES or len(lines) != 1:
        raise FileError(f"{path}: must have one token and nothing else")
    return lines[0]


def _warn(message: Warning | str, *rest: Any) -> None:
    """Another version of the service is told in a line, not as Python tells warnings."""
    typer.echo(f"subpage: {message}", err=True)


class _Lines(logging.Handler):
    """What the client has to tell meanwhile, such as that it is connecting again."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.INFO)
        self._name = name

    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(f"{self._name}: {record.getMessage()}", err=True)


@contextmanager
def told(name: str) -> Iterator[None]:
    """What the client tells goes to standard error, as lines of the command ``name``."""
    logger, handler = logging.getLogger("subpage"), _Lines(name)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


_OPTIONS: dict[str, tuple[Any, Any]] = {
    "server": (_Server, HERE),
    "token": (_Token, None),
    "token_file": (_TokenPath, None),
    "ca": (_Authorities, None),
}


def remote(function: F) -> F:
    """A command whose parameter ``service`` is made of the options that say where the service is."""
    signature = inspect.signature(function, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "service"]
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(name, keyword, default=default, annotation=kind) for name, (kind, default) in _OPTIONS.items()
    ]
    parameters = [parameter.replace(kind=keyword) for parameter in own] + options

    @functools.wraps(function)
    def command(**given: Any) -> None:
        service = Service(*(given.pop(name) for name in _OPTIONS))
        function(service=service, **given)

    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command  # type: ignore[return-value]


def service_of(context: typer.Context) -> Service:
    """The service that a command line names as far as it is typed."""
    given = context.params
    return Service(*(given.get(name, default) for name, (_, default) in _OPTIONS.items()))
