"""Policies asked by many workers of one footprint, which lies in the object store once for each node."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from engine.footprint.costs import Cost
from engine.footprint.places import Footprint
from engine.footprint.question import Question
from engine.kvm.protections import Protection
from scale.errors import ScaleError

_EACH = 4  # tasks for each processor: the last ones to end are not long
_LEAST = 32  # policies of one


def costs(
    ray: Any,
    footprint: Footprint,
    question: Question,
    policies: Sequence[Protection],
    told: Callable[[float], object] = lambda share: None,
) -> list[Cost]:
    """What ``Costs(footprint, question).of(policies)`` gives. Raises ScaleError."""
    from scale import tasks  # noqa: PLC0415 - needs Ray

    workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
    step = max(_LEAST, -(-len(policies) // (_EACH * workers)))
    given = ray.put(footprint), ray.put(question)
    token = secrets.token_hex(8)
    asked = [tasks.costs.remote(token, *given, list(policies[at : at + step])) for at in range(0, len(policies), step)]
    left = asked
    try:
        while left:
            _, left = ray.wait(left, num_returns=1)
            told(1 - len(left) / len(asked))
        return [cost for part in ray.get(asked) for cost in part]
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ScaleError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise ScaleError(f"no worker could ask the policies: {str(error).partition(chr(10))[0]}") from None
