"""Files that are given as traces and are something else: by what each is known, and what makes a trace of it."""

from __future__ import annotations

import re

_SYMBOL = rb"[0-9a-fA-F]{8,16} [a-zA-Z?] \S+(?:[ \t]+\[[\w-]+\])?\r?\n"

_OTHERS: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(mark), what)
    for mark, what in (
        (
            rb"\A(?:\xef\xbb\xbf)?(?:" + _SYMBOL + rb"){2}",
            (
                "is a list of symbols (System.map or kallsyms), not of accesses: "
                "`subpage policy from-symbols FILE --object NAME` makes a policy of it"
            ),
        ),
        (rb"\A\x7fELF", "is an ELF file, not a trace: it has symbols, or the memory of a guest"),
        (rb"\AEMiL", "is a LiME memory image, not a trace"),
        (rb"\A(?:QEVM|QFI\xfb)", "is a state or a disk of QEMU, not a trace"),
        (rb"\APERFILE2", "is perf's own file: `perf script -F comm,tid,time,event,addr,ip` makes text of it"),
        (rb"\A\x17\x08\x44tracing", "is trace-cmd's own file: `trace-cmd report` makes text of it"),
        (rb"\Agem5(?! Simulator)", "is gem5's packet trace: its util/decode_packet_trace.py makes text of it"),
        (rb"\AARROW1", "is an Arrow file; traces are Arrow streams (pyarrow.ipc.new_stream), or Parquet"),
    )
)

# Names, and a number below them.
_TABLE = re.compile(rb"\A(?:\xef\xbb\xbf)?[A-Za-z_\"][\w .\"-]*(?:[,;\t][\w .\"-]*)+\r?\n *\"?[0-9]")


def what_else(head: bytes | bytearray) -> str | None:
    """What a body is that is no trace, by its beginning; None for what is not known."""
    return next((what for mark, what in _OTHERS if mark.search(head)), None)


def unnamed_table(head: bytes | bytearray) -> str | None:
    """What to say of a table of which no column is known to be the address; None for what is none."""
    if _TABLE.search(head) is None:
        return None
    return "this looks like a table without a column gpa: name the one that is meant by columns=gpa=NAME"
