"""Logs as text for people or as one JSON object a line for machines, each with the id of its request."""

from __future__ import annotations

import json
import logging
import logging.config
from datetime import UTC, datetime
from typing import Any

from service.http.envelope import request_id
from service.settings import Settings

_TEXT = "%(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """Time, level, logger, message, the request's id, what ``extra={"fields": ...}`` adds, and the traceback."""

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
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """For a terminal; the request's id follows in brackets."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        identity = request_id.get()
        return f"{text} [{identity}]" if identity else text


def configuration(settings: Settings) -> dict[str, Any]:
    """For ``logging.config.dictConfig``: all goes to standard error, requests only when they are asked for."""
    formatter: dict[str, Any] = {"()": JsonFormatter}
    if settings.log_format == "text":
        formatter = {"()": TextFormatter, "fmt": _TEXT}
    level = settings.log_level.upper()
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"chosen": formatter},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "chosen"}},
        "root": {"handlers": ["stderr"], "level": level},
        "loggers": {"subpage.access": {"level": "INFO" if settings.access_log else "CRITICAL"}},
    }


def configure(settings: Settings) -> None:
    """Set up the logs of this process."""
    logging.config.dictConfig(configuration(settings))
