"""``subpage bitmap``: the write bitmaps of pages, as words and as a picture of their 32 sub-pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli import complete, show
from service.cli.commands import AsJson, Group, command
from service.cli.connection import Service, remote
from service.cli.numbers import parse_number, parse_word
from service.cli.vms import VmArgument, machine
from service.platform.failures import Failure, opened

if TYPE_CHECKING:
    import subpage

bitmaps = typer.Typer(
    cls=Group,
    help="Write bitmaps of pages: bit i of a word is 1 where sub-page i, its 128 bytes, may be written.",
    no_args_is_help=True,
)

_CELLS = 32
_OPEN, _SHUT = "#", "."
# Bytes of a file of words: as many pages as one call takes.
_MOST_BYTES = 4 << 20

Gfn = Annotated[
    int, typer.Argument(parser=parse_number, metavar="GFN", help="Number of the first page: address / 4096.")
]
Pages = Annotated[int, typer.Option("-n", "--npages", min=1, help="How many pages.")]
Layer = Annotated[
    str | None,
    typer.Option(
        help="effective, set, protected or granted: what counts, or one of what it is made of.",
        autocompletion=complete.one_of("effective", "set", "protected", "granted"),
    ),
]


@command(bitmaps, "subpage bitmap get vm_3f9c2a1be07d4c55 0x2 -n 4", name="get")
@remote
def get(
    service: Service,
    vm: VmArgument,
    gfn: Gfn,
    npages: Pages = 1,
    layer: Layer = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write them to a file, 4 bytes a page, little-endian.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the bitmaps of pages as words of 32 bits."""
    found = _read(service, vm, gfn, npages, layer)
    if output is not None:
        try:
            output.write_bytes(b"".join(word.to_bytes(4, "little") for word in found))
        except OSError as error:
            raise Failure(f"{output}: cannot be written: {error.strerror}") from None
    if as_json:
        show.document({"gfn": hex(gfn), "npages": npages, "access": [f"{word:#010x}" for word in found]})
    elif output is None:
        for number, word in enumerate(found):
            typer.echo(f"{gfn + number:#x}  {word:#010x}")


@command(
    bitmaps,
    "subpage bitmap set vm_3f9c2a1be07d4c55 0x4 0xffff0000",
    "subpage bitmap set vm_3f9c2a1be07d4c55 0x4 0 -n 16",
    name="set",
)
@remote
def set_(
    service: Service,
    vm: VmArgument,
    gfn: Gfn,
    access: Annotated[
        list[Any] | None,
        typer.Argument(parser=parse_word, metavar="WORD", help="A word for each page, or one for all of them."),
    ] = None,
    npages: Annotated[int | None, typer.Option("-n", "--npages", min=1, help="How many pages one word is for.")] = None,
    file: Annotated[
        Path | None, typer.Option("--from", help="File of words, 4 bytes a page, little-endian, as `get -o` writes it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Set the bitmaps of pages, all of them or none."""
    words = [int(word) for word in access or ()]
    if (file is None) == (not words):
        raise typer.BadParameter("give words, or a file with --from, and not both", param_hint="access")
    if file is not None:
        words = _words(file)
    if npages is not None:
        if len(words) not in (1, npages):
            raise typer.BadParameter(
                f"{npages} pages need one word, or {npages}, not {len(words)}", param_hint="--npages"
            )
        words *= npages // len(words)
    with service.client() as client:
        machine(client, vm).set_subpages(gfn, words)
    if as_json:
        show.document({"gfn": hex(gfn), "npages": len(words)})
    else:
        typer.echo(f"set {len(words):,} {'page' if len(words) == 1 else 'pages'} from {gfn:#x} on")


@command(bitmaps, "subpage bitmap show vm_3f9c2a1be07d4c55 0x2 -n 4", name="show")
@remote
def show_(
    service: Service, vm: VmArgument, gfn: Gfn, npages: Pages = 16, layer: Layer = None, as_json: AsJson = False
) -> None:
    """Draw the bitmaps of pages: a line of 32 cells for each, one for each sub-page of 128 bytes."""
    found = _read(service, vm, gfn, npages, layer)
    if as_json:
        pages = [{"gfn": hex(gfn + number), "shut": shut_of(word)} for number, word in enumerate(found)]
        show.document({"npages": npages, "pages": pages})
        return
    for text in drawn(gfn, list(found)):
        show.console().print(text, soft_wrap=True) if show.on_terminal() else typer.echo(str(text))


def shut_of(word: int) -> list[int]:
    """The sub-pages that may not be written."""
    return [bit for bit in range(_CELLS) if not word >> bit & 1]


def drawn(gfn: int, words: list[int]) -> Iterator[Any]:
    """Lines of a grid, with a ruler of sub-pages above and what it is made of below."""
    from rich.text import Text

    width = max(len(f"{gfn + len(words) - 1:#x}"), len("GFN"))
    ruler = "".join(f"{at:<8}" for at in range(0, _CELLS, 8))
    yield Text(f"{'GFN':<{width}}  {ruler}SHUT", style="bold")
    for number, word in enumerate(words):
        row = Text(f"{gfn + number:#0{width}x}  " if gfn + number else f"{'0x0':<{width}}  ")
        for bit in range(_CELLS):
            is_open = bool(word >> bit & 1)
            row.append(_OPEN if is_open else _SHUT, style="green" if is_open else "bold red")
        shut = _CELLS - word.bit_count()
        yield row.append(f"  {shut:>4}" if shut else "     -")
    shut = sum(_CELLS - word.bit_count() for word in words)
    yield Text(f"{_OPEN} may be written, {_SHUT} may not: {shut:,} of {len(words) * _CELLS:,} sub-pages")


def _read(service: Service, vm: str, gfn: int, npages: int, layer: str | None) -> subpage.Bitmap:
    with service.client() as client:
        return machine(client, vm).subpages(gfn, npages, layer=layer)


def _words(file: Path) -> list[int]:
    with opened(file) as source:
        data = source.read(_MOST_BYTES + 1)
    if not data or len(data) % 4 or len(data) > _MOST_BYTES:
        raise Failure(f"{file}: has {len(data):,} bytes or more; must be 4 for each page, {_MOST_BYTES:,} at most")
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
