"""Logs as text for people or as one JSON object a line for machines, each with the id of its request.

Of libraries only warnings are logged, at any level: below that they tell what is on the wire and in statements, tokens
and digests included. What reads like a token is hidden wherever it comes from.
"""

from __future__ import annotations

import json
import logging
import logging.config
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from service.security.tokens import without_tokens
from service.settings import Settings

# The request being served, for whatever is logged meanwhile.
request_id: ContextVar[str] = ContextVar("request_id", default="")

_TEXT = "%(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """Time, level, logger, message, the request's id, what ``extra={"fields": ...}`` adds, and the traceback."""

    def __init__(self, secret: str | None = None) -> None:
        super().__init__()
        self._secret = secret

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if identity := request_id.get():
            line["request_id"] = identity
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return without_tokens(json.dumps(line, default=str), self._secret)


class TextFormatter(logging.Formatter):
    """For a terminal; the request's id follows in brackets. A record is one line, and those of its traceback after it
    are indented: whatever a client sends, it begins no line and moves no cursor."""

    def __init__(self, *args: Any, secret: str | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._secret = secret

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = printable(record.message)
        identity = request_id.get()
        text = super().formatMessage(record)
        return f"{text} [{identity}]" if identity else text

    def formatException(self, ei: Any) -> str:  # noqa: N802
        lines = super().formatException(ei).split("\n")
        return "\n".join(f"  {printable(line)}" for line in lines)

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        # What one formatter has made of a traceback is kept with the record, for others that want it differently.
        record.exc_text = None
        return without_tokens(text, self._secret)


def printable(text: str) -> str:
    r"""``text`` on one line: what is no visible character nor a space reads ``\n``, ``\x1b``, ``\u2028``."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def configuration(settings: Settings) -> dict[str, Any]:
    """For ``logging.config.dictConfig``: all goes to standard error, requests only when they are asked for."""
    secret = settings.token.get_secret_value() if settings.token is not None else None
    formatter: dict[str, Any] = {"()": JsonFormatter, "secret": secret}
    if settings.log_format == "text":
        formatter = {"()": TextFormatter, "fmt": _TEXT, "secret": secret}
    level = settings.log_level.upper()
    libraries = level if level in ("ERROR", "CRITICAL") else "WARNING"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"chosen": formatter},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "chosen"}},
        "root": {"handlers": ["stderr"], "level": libraries},
        "loggers": {
            "subpage": {"level": level},
            "subpage.access": {"level": "INFO" if settings.access_log else "CRITICAL"},
            # It warns of each client that does not speak HTTP, which is the client's business.
            "uvicorn.error": {"level": "ERROR" if libraries == "WARNING" else libraries},
        },
    }


def configure(settings: Settings) -> None:
    """Set up the logs of this process."""
    logging.config.dictConfig(configuration(settings))
