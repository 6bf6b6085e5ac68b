"""What a replay says about translations: the operations of the trace, and accesses that went by stale translations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# How many of each are listed; totals count them all.
MOST_LISTED = 1000

# Why an operation did not remove a translation, the nearest miss first.
MISSES = (
    "not-targeted",
    "left",
    "refused",
    "not-executed",
    "kept",
    "local",
    "other-space",
    "other-page",
)


@dataclass(frozen=True, slots=True)
class Miss:
    """The operation that came nearest to removing a stale translation: ``index``, ``op`` and ``why`` of MISSES.

    ``flushed`` are the VP indices that it reached; ``status`` that of a hypercall that has one.
    """

    index: int
    op: str
    why: str
    flushed: tuple[int, ...]
    status: int | None


@dataclass(frozen=True, slots=True)
class StaleTranslation:
    """An access, or the part of one in a page, by a translation that should have been gone.

    ``gpa`` is the one recorded, ``cached_gpa`` that of the translation, which record ``cached_at`` made (None: it was
    there before the trace). ``changed_after`` is the last record that had the old frame, None if none had: what should
    have removed it is between that and ``index``. ``missed_by`` is None where nothing came near.
    """

    index: int
    vcpu: int
    vp_index: int
    gva: int
    address_space: int
    size: int
    access: int
    gpa: int
    cached_gpa: int
    cached_at: int | None
    changed_after: int | None
    missed_by: Miss | None
    explanation: str


@dataclass(frozen=True, slots=True)
class PerformedOperation:
    """An operation of the trace.

    ``operand`` is the input value of a hypercall, the new CR3, the linear address. ``outcome`` is one of
    ``hyperv.outcome.OUTCOMES`` for a hypercall; of the others ``completed``, ``exception`` or ``exit``. ``result`` is
    the 64-bit value of a hypercall. ``targeted`` and ``flushed`` are VP indices; ``dropped`` and ``left`` count the
    translations that went, and that had to go but did not.
    """

    index: int
    vcpu: int
    op: str
    operand: int
    outcome: str
    result: int | None
    targeted: tuple[int, ...]
    flushed: tuple[int, ...]
    dropped: int
    left: int


@dataclass(frozen=True)
class Translations:
    """All of it. ``operations`` counts by name; ``stale`` counts accesses; the lists hold the first MOST_LISTED."""

    stale: int = 0
    operations: Mapping[str, int] = field(default_factory=dict)
    stale_records: tuple[StaleTranslation, ...] = ()
    stale_dropped: int = 0
    operation_records: tuple[PerformedOperation, ...] = ()
    operations_dropped: int = 0
