"""Which of many traces are samples: what is counted of them is of these alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scale.errors import ScaleError
from scale.sources import Source, filesystem
from service.cli.recorded_files import sample_in, sampled

# Of so many it is looked at what they say of themselves: of an object that is a request or two.
_MOST = 100
_KINDS = {b"PAR1": "parquet", b"\xff\xff\xff\xff": "arrow"}


def line_of_samples(sources: Sequence[Source]) -> str | None:
    """What is said of traces of which some are samples."""
    looked = sources[:_MOST]
    found = [count for count in map(_sample_of, looked) if count]
    if not found:
        return None
    if len(sources) == 1:
        return sampled(found[0])
    of = f"the first {len(looked)} traces" if len(looked) < len(sources) else f"{len(looked)} traces"
    every = " or ".join(f"{count:,}" for count in sorted(set(found)))
    return (
        f"Samples: {len(found)} of {of}. They have one of every {every} stores, and what is counted is of these alone."
    )


def _sample_of(source: Source) -> int:
    """Of a file that cannot be read nothing is said here: whoever reads it tells."""
    try:
        files, path = filesystem(source.name)
        with files.open_input_file(path) as file:
            kind = _KINDS.get(_beginning(file), "")
            return sample_in(file, kind)
    except (OSError, ScaleError):
        return 0


def _beginning(file: Any) -> bytes:
    found = bytes(file.read(4))
    file.seek(0)
    return found
