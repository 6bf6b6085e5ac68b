"""``subpage record``: every store of a guest that runs in QEMU, as a trace file."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.cli import show
from service.cli.commands import AsJson
from service.cli.progress import ProgressOption

if TYPE_CHECKING:
    from capture.recording import Recording, Wanted

GuestCommand = Annotated[
    list[str],
    typer.Argument(metavar="-- QEMU…", help="The command line of QEMU that starts the guest: qemu-system-x86_64 …"),
]
Start = Annotated[
    str | None,
    typer.Option(
        metavar="WHERE[:N]",
        help="Begin when the instruction at an address (0x…), or at a symbol of --symbols, runs for the N-th time.",
    ),
]
Until = Annotated[
    str | None,
    typer.Option(
        metavar="WHERE[:N]",
        help="End the guest when the instruction there runs for the N-th time since recording began.",
    ),
]
SymbolFile = Annotated[
    Path | None, typer.Option("--symbols", help="The guest kernel's symbols: kallsyms, System.map, ISF or ELF.")
]
Only = Annotated[
    str | None, typer.Option(metavar="LOW-HIGH", help="Only stores to these guest-physical addresses, HIGH excluded.")
]
Most = Annotated[int | None, typer.Option("--max", min=1, help="End the guest after so many stores.")]


def record(
    command: GuestCommand,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write: .parquet, or .arrow (a stream).")],
    start: Start = None,
    until: Until = None,
    symbols: SymbolFile = None,
    only: Only = None,
    most: Most = None,
    values: Annotated[
        bool,
        typer.Option("--values", help="With the CR3 and the bytes that are stored, which QEMU 9.2 and later tell."),
    ] = False,
    sample: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=1 << 32, help="Of every N stores of a vCPU record one; the file is not the whole."
        ),
    ] = 1,
    progress: ProgressOption = None,
    as_json: AsJson = False,
) -> None:
    """Record every store of a guest that runs in QEMU, for `subpage replay` and `POST …/traces`. Ctrl-C ends the guest
    and closes the file.
    """
    from capture.errors import CaptureError
    from capture.recording import NOT_SEEN, Recording
    from service.cli.guests import stopping, watched
    from service.cli.recorded_files import RecordedFile, sampled, suffix_of
    from service.cli.trace_parquet import replacing
    from service.platform.failures import Failure

    suffix = suffix_of(output)
    wanted = replace(wanted_of(start, until, symbols, only, most), wide=values, sample=sample)
    try:
        with Recording(command, wanted) as recording, stopping(recording), replacing(output) as beside:
            file = RecordedFile(beside, suffix, recording.identity(), wide=values)
            with watched("recording", recording, progress) as watch:
                for records in recording:
                    file.add(records)
                    watch.see(records)
            file.close()
    except CaptureError as error:
        raise Failure(str(error)) from None
    size = output.stat().st_size
    if as_json:
        show.document({"file": str(output), "bytes": size, "sample": sample, **asdict(recording.counts)})
    else:
        typer.echo(f"{watch.told()} in {output}, {size / (1 << 20):.1f} MiB")
        if sample > 1:
            typer.echo(sampled(sample))
        typer.echo(left_out(recording))
        typer.echo(NOT_SEEN)
    ended(recording, "record")


def left_out(recording: Recording) -> str:
    """Stores that were seen and are no records."""
    counts = recording.counts
    told = [
        f"{counts.devices:,} to devices",
        f"{counts.elsewhere:,} to firmware, video memory or addresses that were not asked for",
    ]
    if counts.unknown:
        told.append(f"{counts.unknown:,} whose address QEMU did not know")
    return f"Left out: {', '.join(told)}. The guest waited {counts.waits:,} times for the reader."


def ended(recording: Recording, name: str) -> None:
    """Say why the guest ended; exit with status 130 or 1 where that was not its own end."""
    typer.echo(f"subpage {name}: {recording.word}", err=True)
    if recording.stopped:
        raise typer.Exit(130)
    if recording.failed or not recording.taken:
        raise typer.Exit(1)


def wanted_of(
    start: str | None,
    until: str | None,
    symbols: Path | None,
    only: str | None,
    most: int | None,
    *,
    later: bool = False,
) -> Wanted:
    """The options as one; ``later``: symbols will be there. Raises Failure, naming the option."""
    from capture.recording import Wanted
    from service.platform.failures import Failure

    pc, count = start_of(start, symbols, later=later) if start is not None else (0, 1)
    stop_pc, stop_n = start_of(until, symbols, option="--until") if until is not None else (0, 1)
    low, high = 0, 1 << 64
    if only is not None:
        first, dash, last = only.partition("-")
        low, high = _number(first, f"--only {only}"), _number(last if dash else "", f"--only {only}: LOW-HIGH")
        if not low < high <= 1 << 52:
            raise Failure(f"--only {only}: must be LOW-HIGH with LOW below HIGH, and HIGH at most 2^52")
    return Wanted(pc, count, low, high, most, stop_pc, stop_n)


def start_of(start: str, symbols: Path | None, *, later: bool = False, option: str = "--start") -> tuple[int, int]:
    """``WHERE[:N]``: the address, and how often. ``later``: a symbol has no address yet. Raises Failure."""
    from capture.recording import LATER
    from service.platform.failures import Failure

    where, _, times = start.rpartition(":") if ":" in start else (start, "", "1")
    count = _number(times, f"{option} {start}: the N of WHERE:N")
    if count < 1:
        raise Failure(f"{option} {start}: the N of WHERE:N must be at least 1")
    if where.startswith("0x"):
        pc = _number(where, f"{option} {start}")
    else:
        pc = LATER if later else _address(where, f"{option} {start}", symbols)
    if not 0 < pc < 1 << 64:
        raise Failure(f"{option} {start}: must be an address of 64 bits, not 0")
    return pc, count


def _address(name: str, said: str, symbols: Path | None) -> int:
    from service.cli.symbol_policies import read_symbols
    from service.platform.failures import Failure

    if symbols is None:
        raise Failure(f"{said}: {name} is a symbol, which --symbols FILE must have; an address begins with 0x")
    found = read_symbols(symbols).table.find(name)
    if not found:
        raise Failure(f"{said}: {symbols} has no symbol {name}")
    return int(found[0].address)


def _number(text: str, what: str) -> int:
    from service.platform.failures import Failure

    try:
        return int(text, 0)
    except ValueError:
        raise Failure(f"{what} must be a number, as 0x1000 or 4096") from None
