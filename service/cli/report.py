"""The report of ``subpage demo`` and ``subpage replay`` as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_NEXT = (
    "subpage serve                          the service on http://127.0.0.1:8000, its API at /docs",
    "subpage demo --json                    this report as JSON",
    "subpage demo --trace F --policy F      your own trace and policy",
    "subpage replay F --policy F            the same without a service",
    "GET /v1/vms/{vm}/traces/{id}/exits     every exit record: JSON, NDJSON or Arrow",
    "GET /v1/vms/{vm}/walk?gpa=…            why a write is refused, entry by entry",
)


def print_report(
    report: dict[str, Any], console: Console | None = None, *, how: str = "over HTTP", further: Sequence[str] = _NEXT
) -> None:
    """Print what ``service.cli.demo.report_of`` gives: ``how`` the trace was replayed, and where to look next."""
    console = console or Console(highlight=False)
    console.print()
    console.print(f"[bold]{report['policy']}[/bold] against [bold]{report['trace']}[/bold]")
    console.print(
        f"{report['protected_subpages']:,} sub-pages of 128 bytes protected, in {report['protected_pages']:,} pages; "
        f"guest RAM {report['memory'] / (1 << 30):g} GiB"
    )
    console.print(_objects(report))
    console.print(_totals(report, how))
    for note in report["notes"]:
        console.print(f"[bold]Note:[/bold] {escape(note)}")
    for record in report["first_exit_records"]:
        hit = ", ".join(record["objects"]) or "no object"
        where = f"{record['size']} bytes at {record['gpa']}, sub-pages {record['subpages']}"
        console.print(f"  record {record['index']:,}: {where}: {hit}")
    console.print()
    if further:
        console.print("[bold]Where to look next[/bold]")
    for line in further:
        console.print(f"  {line}", markup=False)


def _objects(report: dict[str, Any]) -> Table:
    table = Table(title=None, header_style="bold")
    table.add_column("object")
    for name in ("sub-pages", "violations", "collateral", "first record"):
        table.add_column(name, justify="right")
    for hit in sorted(report["objects"], key=lambda item: -item["violations"]):
        first = f"{hit['first_index']:,}" if hit["first_index"] is not None else "–"
        style = None if hit["violations"] else "dim"
        numbers = (hit["subpages"], hit["violations"], hit["collateral"])
        table.add_row(hit["name"], *(f"{number:,}" for number in numbers), first, style=style)
    return table


def _totals(report: dict[str, Any], how: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    factor = f"{report['factor']:g} times as many" if report["factor"] is not None else ""
    table.add_row(
        "writes replayed", f"{report['writes']:,}", f"of {report['records']:,} records, {report['mmio']:,} MMIO"
    )
    table.add_row("exits with sub-pages", f"[bold]{report['violations']:,}[/bold]", "writes refused")
    table.add_row("exits with whole pages", f"[bold]{report['page_granular_violations']:,}[/bold]", factor)
    rate = f"{(report['writes_per_second'] or 0) / 1e6:,.1f} M writes/s {how}, decoding included"
    table.add_row("time", f"{report['seconds']:.2f} s", rate)
    return table
