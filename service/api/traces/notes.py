"""Words about a result that looks like a mistake, for whoever posted the trace."""

from __future__ import annotations

from engine.trace.results import TraceResult

# From this share of the accesses on, in percent, MMIO looks like a mistake: the recorded boot of a guest has 0.02.
MMIO_PERCENT = 10


def notes_of(result: TraceResult) -> list[str]:
    """What to look at, from the totals alone; nothing where nothing is odd."""
    if result.mmio == 0 or result.mmio * 100 < result.records * MMIO_PERCENT:
        return []
    what = "writes" if result.writes == result.records else "accesses"
    share = f"{result.mmio * 100 // result.records} % of the {what}"
    why = "are these virtual addresses (`address=gva`), or is RAM larger than the slots?"
    return [f"{share} lie outside every slot; {why}"]
