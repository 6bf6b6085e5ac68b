"""The words with which a caller says how accesses are replayed. Types, choices and messages elsewhere come from these.

Plain words and nothing to compile: what takes them from a caller need not load the engine's kernels.
"""

from typing import Literal, get_args

# What becomes of a write that is refused: ``trace.replay`` does it, or pauses there and asks (``trace.interactive``).
Resolved = Literal["skip", "stop", "allow", "grant"]
OnViolation = Literal[Resolved, "ask"]
ASK: Literal["ask"] = "ask"

# What a tool that is asked may answer, in the order of its documents; what becomes of a question that all leave open.
Answer = Literal["allow", "skip", "grant", "retry", "stop"]
DefaultAnswer = Literal["allow", "skip", "grant", "stop"]

# Which exits become exit records.
Include = Literal["violations", "all"]

# What the addresses of a trace are: guest-physical; linear ones of the guest, which its page tables translate; or those
# of a process without a guest around it, which are taken for guest-physical ones.
Address = Literal["gpa", "gva", "flat"]

# Bodies, one reader each, and the layouts of packed records.
Format = Literal["json", "ndjson", "arrow", "parquet", "packed"]
RecordFormat = Literal["gpa8", "record16"]

# What tools write, ``trace.readers.formats`` has a row of each; auto: whichever of them it is.
ToolFormatName = Literal[
    "lackey",
    "drmemtrace",
    "execlog",
    "bochs",
    "gem5",
    "champsim",
    "ftrace",
    "perf-script",
    "perf-mem",
    "hyperdbg",
    "csv",
    "auto",
]

ON_VIOLATION: tuple[str, ...] = get_args(OnViolation)
ANSWERS: tuple[str, ...] = get_args(Answer)
ADDRESSES: tuple[str, ...] = get_args(Address)
INCLUDE: tuple[str, ...] = get_args(Include)
FORMATS: tuple[str, ...] = get_args(Format)
RECORD_FORMATS: tuple[str, ...] = get_args(RecordFormat)
TOOL_FORMATS: tuple[str, ...] = get_args(ToolFormatName)
