"""What every command has: mistakes told in a line with the nearest that there is, examples, settings given anywhere."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from service.cli.statuses import Status
from service.platform.failures import Failure

F = TypeVar("F", bound=Callable[..., None])

_COMPLETION = ("--install-completion", "--show-completion")


class Command(TyperCommand):
    """A command that tells a Failure in one line and exits with its status, and says when it was interrupted."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Failure as failure:
            from service.cli.show import printable

            typer.echo(printable(f"{name_of(ctx)}: {failure}", also="\n"), err=True)
            raise typer.Exit(failure.status) from None
        except KeyboardInterrupt:
            typer.echo(f"{name_of(ctx)}: interrupted", err=True)
            raise typer.Exit(Status.INTERRUPTED) from None
        except BrokenPipeError:
            _discard_output()
            raise typer.Exit(Status.NO_READER) from None


class Group(TyperGroup):
    """Commands of one subject. A name that none has is answered with the nearest, of other groups, too."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except typer.TyperException as error:
            near = get_close_matches(args[0], self.commands, 3)
            names = [f"{name_of(ctx)} {name}" for name in near] or _elsewhere(ctx.find_root().command, args[0])
            error.message = f"there is no command {args[0]!r}{_perhaps(names)}"
            raise


class Root(Group):
    """All commands. What completes them in a shell takes no value: a name after it would be passed over."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = next((option for option in _COMPLETION if args[:1] == [option] and len(args) > 1), None)
        if given is not None and not ctx.resilient_parsing:
            rule = f"it is for the shell that it is called from, and takes nothing else (got {' '.join(args[1:])})"
            raise typer.BadParameter(rule, ctx=ctx, param_hint=given)
        return super().parse_args(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, and exit with the status of the table in ``service.cli.statuses``."""
        given = (args, prog_name, complete_var, False, windows_expand_args)
        if not standalone_mode:
            return super().main(*given, **extra)
        try:
            status = super().main(*given, **extra)
        except typer.TyperException as error:
            status = _told(error)
        except typer.Abort:
            typer.echo("subpage: interrupted", err=True)
            status = Status.INTERRUPTED
        sys.exit(status if isinstance(status, int) else Status.DONE)


def command(group: typer.Typer, *examples: str, name: str | None = None, panel: str | None = None) -> Callable[[F], F]:
    """Add a function to a group, with examples for its help, which a test runs; ``panel``: under which title."""
    epilog = "\n\n".join(("Examples:" if len(examples) > 1 else "Example:", *(f"  {line}" for line in examples)))
    return group.command(name, cls=Command, epilog=epilog if examples else None, rich_help_panel=panel)


def examples_of(found: Any) -> list[str]:
    """The command lines that ``command`` was given."""
    lines = (found.epilog or "").split("\n\n")
    return [line.strip() for line in lines if line.startswith("  ")]


def is_typed(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, and not in the environment alone."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def name_of(ctx: Any) -> str:
    """``subpage token create``, however it was started."""
    names: list[str] = []
    while ctx.parent is not None:
        names.insert(0, ctx.info_name)
        ctx = ctx.parent
    return " ".join(["subpage", *names])


def _told(error: Any) -> int:
    """Say what is wrong with a command line, in one line; the status to exit with."""
    ctx = getattr(error, "ctx", None)
    name = "subpage" if ctx is None else name_of(ctx)
    if ctx is not None and type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(ctx.get_help())
        return int(error.exit_code)
    text = error.format_message()
    if (option := getattr(error, "option_name", None)) and hasattr(error, "possibilities"):
        known = [name for param in ctx.command.params for name in (*param.opts, *param.secondary_opts)] if ctx else []
        text = f"there is no option {option}{_perhaps(get_close_matches(option, known, 3))}"
    hint = "" if text.endswith("?") else f"; see `{name} --help`"
    typer.echo(f"{name}: {_in_line(text)}{hint}", err=True)
    return int(error.exit_code)


def _in_line(text: str) -> str:
    """A message as one that goes on: without the full stop, and lower case where it began a sentence."""
    text = " ".join(text.split()).rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _perhaps(names: Sequence[str]) -> str:
    return f": did you mean {' or '.join(f'`{name}`' for name in names)}?" if names else ""


def _elsewhere(root: Any, name: str) -> list[str]:
    """Commands of that name in groups."""
    groups = ((title, group) for title, group in root.commands.items() if isinstance(group, TyperGroup))
    return [f"subpage {title} {name}" for title, group in groups if name in group.commands]


def _discard_output() -> None:
    """Nobody reads what is still to be flushed when the process ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _names(incomplete: str) -> list[str]:
    """Settings, for the shell."""
    from service.settings import Settings

    return [f"{name}=" for name in Settings.model_fields if name.startswith(incomplete)]


def _take(context: typer.Context, given: list[str] | None) -> None:
    """Remember settings that were given; those after the command's name outrank those before."""
    if not given or context.resilient_parsing:
        return
    from service.cli.common import parse_flags

    root = context.find_root()
    root.obj = {**(root.obj or {}), **parse_flags(given)}


# The parameter ``given`` of a command that reads settings: they reach it by ``service.cli.common.common_flags``.
Given = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting; may be repeated.",
        autocompletion=_names,
        callback=_take,
        expose_value=False,
    ),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
