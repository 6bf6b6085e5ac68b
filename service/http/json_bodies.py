"""JSON documents out of request bodies: how much may be in one is decided before anything is made of it.

What a parser makes of a few bytes can be two hundred times as large, and neither it nor the checks of a model let
others run meanwhile. So the values of a large body are counted first, and it is parsed and checked in a thread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from functools import lru_cache
from typing import Any, TypeVar, cast

import numpy as np
from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request

from service.http.handlers import refused, symbols_told
from service.problems import BodyTooLarge, ServiceError
from service.runtime.offload import maybe_in_thread
from service.settings import Settings

T = TypeVar("T")

# Above this, counting and parsing take longer than the event loop should be kept from others.
INLINE_BYTES = 1 << 16

# What a value costs to parse and to keep, against an item of a list.
_COSTS = ((b",", 1), (b"[", 1), (b":", 4), (b"{", 4))

_JSON = re.compile(r"application/([\w.-]{1,100}\+)?json")


def is_json(media: str) -> bool:
    """Whether a Content-Type, parameters and all, says that the body is JSON."""
    return _JSON.fullmatch(media.partition(";")[0].strip().lower()) is not None


def weight(content: bytes) -> int:
    """A bound on the values in ``content``: items of lists once, members and objects four times.

    What stands in strings counts, too: nobody has to know where they begin and end.
    """
    octets = np.frombuffer(content, dtype=np.uint8)
    return sum(cost * int(np.count_nonzero(octets == sign[0])) for sign, cost in _COSTS)


def weigh(content: bytes, limit: int) -> None:
    """Raise BodyTooLarge where ``content`` may have more values than ``limit``."""
    if 4 * len(content) > limit and weight(content) > limit:
        raise BodyTooLarge(f"must be at most {limit} values, members and objects counted four times", field="body")


@lru_cache(maxsize=256)
def _adapter(model: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast("Any", model))


def parsed(model: type[T], content: bytes, settings: Settings) -> T:
    """``content`` as a ``model``.

    Raises BodyTooLarge for one of too many values, and what ``refused`` makes of faults.
    """
    weigh(content, settings.max_document_values)
    try:
        found: T = _adapter(cast("Hashable", model)).validate_json(content)
    except ValidationError as error:
        raise _symbols(content) or _malformed(content) or refused(error, model, "body") from None
    return found


def _symbols(content: bytes) -> ServiceError | None:
    """What to do with a file of symbols, where a document was expected."""
    if (found := symbols_told(content)) is None:
        return None
    return ServiceError(f"the body must be a document of this call{found}", code="malformed-body")


def _malformed(content: bytes) -> ServiceError | None:
    """What is wrong with ``content`` as JSON, and where; None if it is JSON, or too long to look at once more."""
    try:
        if len(content) <= INLINE_BYTES:
            json.loads(content)
    except json.JSONDecodeError as error:
        rule = f"the body must be JSON: {error.msg}, line {error.lineno} column {error.colno}"
        return ServiceError(rule, code="malformed-body")
    except (ValueError, RecursionError):
        return None
    return None


async def parse(model: type[T], content: bytes, settings: Settings) -> T:
    """``parsed``, in a thread where that takes long."""
    return await maybe_in_thread(len(content) <= INLINE_BYTES, parsed, model, content, settings)


class Received(Request):
    """A request whose document the framework need not parse again: it takes the model as it is."""

    document: object = None

    async def json(self) -> Any:
        return self.document


async def received(model: Any, request: Request) -> Request:
    """``request`` with its body parsed as ``model``, where it has one and that is JSON. Raises as ``parsed``."""
    replacement = Received(request.scope, request.receive)
    content = await replacement.body()
    if content and is_json(request.headers.get("content-type", "")):
        replacement.document = await parse(model, content, request.app.state.settings)
    return replacement
