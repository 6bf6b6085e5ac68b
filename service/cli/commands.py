"""What every command of the command line has: failures told in a line, and settings given before or after its name."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from service.platform.failures import Failure

_COMPLETION = ("--install-completion", "--show-completion")


class Command(TyperCommand):
    """A command that tells a Failure in one line and exits with its status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Failure as failure:
            typer.echo(f"{name_of(ctx)}: {failure}", err=True)
            raise typer.Exit(failure.status) from None


class Root(TyperGroup):
    """All commands. What completes them in a shell takes no value: a name after it would be passed over."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = next((option for option in _COMPLETION if args[:1] == [option] and len(args) > 1), None)
        if given is not None and not ctx.resilient_parsing:
            rule = f"it is for the shell that it is called from, and takes nothing else (got {' '.join(args[1:])})"
            raise typer.BadParameter(rule, ctx=ctx, param_hint=given)
        return super().parse_args(ctx, args)


def name_of(ctx: Any) -> str:
    """``subpage token create``, however it was started."""
    names: list[str] = []
    while ctx.parent is not None:
        names.insert(0, ctx.info_name)
        ctx = ctx.parent
    return " ".join(["subpage", *names])


def _names(incomplete: str) -> list[str]:
    """Settings, for the shell."""
    from service.settings import Settings  # noqa: PLC0415

    return [f"{name}=" for name in Settings.model_fields if name.startswith(incomplete)]


def _take(context: typer.Context, given: list[str] | None) -> None:
    """Remember settings that were given; those after the command's name outrank those before."""
    if not given or context.resilient_parsing:
        return
    from service.cli.common import parse_flags  # noqa: PLC0415

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
