"""The one table of the formats that tools write: contract, help of commands, documents and messages come from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from engine.trace.columns import USABLE
from engine.trace.option_names import TOOL_FORMATS
from engine.trace.readers.bochs import BOCHS
from engine.trace.readers.champsim_marks import is_champsim
from engine.trace.readers.drmemtrace import DRMEMTRACE
from engine.trace.readers.execlog import EXECLOG
from engine.trace.readers.ftrace import FTRACE
from engine.trace.readers.gem5 import GEM5
from engine.trace.readers.hyperdbg import HYPERDBG
from engine.trace.readers.lackey import LACKEY
from engine.trace.readers.perf_mem import PERF_MEM
from engine.trace.readers.perf_script import PERF_SCRIPT
from engine.trace.readers.tool_format import CSV, OCTETS, TEXT, ToolFormat

CHAMPSIM = ToolFormat(
    name="champsim",
    tool="the tracers of ChampSim (Pin, CVP converter)",
    made="pin -t champsim_tracer.so -o trace.champsim -- PROGRAM",
    address="process-virtual",
    reads="each source memory of an instruction",
    writes="each destination memory of an instruction",
    executes="none",
    columns=("gpa", "size", "access", "pc"),
    media=(OCTETS,),
    assumed_size=8,
)

CSV_TABLE = ToolFormat(
    name="csv",
    tool="anything: a line of names, then a line for each access, with commas, tabs or semicolons",
    made="columns=gpa=ADDR,size=LEN names the columns of the file that are meant; numbers are decimal or 0x…",
    address="guest-physical",
    reads="`access` 0, `read`, `r` or `load`",
    writes="`access` 1, `write`, `w` or `store`; what there is without that column",
    executes="`access` 2, `execute`, `x` or `fetch`",
    columns=tuple(name for name in USABLE if name != "arg"),
    # A word, then several more with the same mark between them, one of which is that of an address.
    mark=re.compile(rb"\A(?:\xef\xbb\xbf)?(?:[^\n]*[,;\t])?\"? *(?i:gpa|gva)\"?(?:[,;\t][^\n]*)?\r?(?:\n|\Z)"),
    media=(CSV, TEXT),
)

_TOOLS = (
    *(LACKEY, DRMEMTRACE, EXECLOG, BOCHS, GEM5, CHAMPSIM),
    *(FTRACE, PERF_SCRIPT, PERF_MEM, HYPERDBG, CSV_TABLE),
)

# In the order in which a body is compared with them; each name is a word of ``option_names``.
FORMATS: Mapping[str, ToolFormat] = MappingProxyType({tool.name: tool for tool in _TOOLS})

assert set(FORMATS) | {"auto"} == set(TOOL_FORMATS)


def recognised(head: bytes | bytearray) -> ToolFormat | None:
    """The format of which a body has the first mark, by its beginning; None for none."""
    best: tuple[int, ToolFormat] | None = None
    for tool in FORMATS.values():
        found = tool.mark.search(head) if tool.mark is not None else None
        if found is not None and (best is None or found.start() < best[0]):
            best = found.start(), tool
    if best is None:
        return CHAMPSIM if is_champsim(head) else None
    return best[1]


def mistaken(head: bytes | bytearray, *, binary: bool = True) -> str | None:
    """What to say of a body that is of a tool and was sent as something else; None for any other.

    ``binary``: also what is known by no mark of text.
    """
    tool = recognised(head)
    if tool is None or (tool.mark is None and not binary):
        return None
    how = f"{tool.media[0]} with format={tool.name}" if tool.mark is None else tool.media[0]
    return f"this looks like a {tool.name} trace: send it as {how}, or convert it with `subpage trace convert`"
