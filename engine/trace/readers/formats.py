"""The one table of the formats that tools write: contract, help of commands, documents and messages come from it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from engine.trace.option_names import TOOL_FORMATS
from engine.trace.readers.bochs import BOCHS
from engine.trace.readers.drmemtrace import DRMEMTRACE
from engine.trace.readers.execlog import EXECLOG
from engine.trace.readers.ftrace import FTRACE
from engine.trace.readers.gem5 import GEM5
from engine.trace.readers.hyperdbg import HYPERDBG
from engine.trace.readers.lackey import LACKEY
from engine.trace.readers.perf_mem import PERF_MEM
from engine.trace.readers.perf_script import PERF_SCRIPT
from engine.trace.readers.tool_format import ToolFormat

# In the order in which a body is compared with them; each name is a word of ``option_names``.
FORMATS: Mapping[str, ToolFormat] = MappingProxyType(
    {tool.name: tool for tool in (LACKEY, DRMEMTRACE, EXECLOG, BOCHS, GEM5, FTRACE, PERF_SCRIPT, PERF_MEM, HYPERDBG)}
)

assert set(FORMATS) | {"auto"} == set(TOOL_FORMATS)


def recognised(head: bytes | bytearray) -> ToolFormat | None:
    """The format of which a body has the first mark, by its beginning; None for none."""
    best: tuple[int, ToolFormat] | None = None
    for tool in FORMATS.values():
        found = tool.mark.search(head) if tool.mark is not None else None
        if found is not None and (best is None or found.start() < best[0]):
            best = found.start(), tool
    return None if best is None else best[1]
