"""docs/reference.md from the code: every setting, every problem type; and tables in docs/traces.md, docs/client.md and
docs/kvmi.md.

``python -m service.cli.reference --write``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from engine.trace.readers import FORMATS
from service.cli.client_calls import table as operations_text
from service.kvmi.about import page_text
from service.problems import PROBLEMS
from service.settings import GIB, MIB, Settings

REFERENCE = Path(__file__).parents[2] / "docs" / "reference.md"
# Pages with a table between two lines.
TRACES, CLIENT = REFERENCE.with_name("traces.md"), REFERENCE.with_name("client.md")

_HEAD = """\
# Reference

Made from the code by `make openapi`; a test fails when it is not current.

## Settings

Each is an environment variable; the same names without the prefix and in lower case are keys of the TOML file that
`SUBPAGE_CONFIG` or `subpage --config` names, and of `subpage --set name=value`. Flags outrank the environment, which
outranks the file. `subpage config` prints what is in effect.

Sizes are bytes, times seconds unless the name says otherwise.

| variable | type | default | |
|---|---|---|---|
"""
_PROBLEMS = """
## Problem types

Errors are `application/problem+json` (RFC 9457). `type` is `/problems/<code>`, which the service answers as well.

| code | status | |
|---|---|---|
"""

_FORMATS = """\
| `format` | what it is and how it is made | addresses | sizes | accesses | sent as |
|---|---|---|---|---|---|
"""


def reference_text() -> str:
    """The whole page."""
    settings = "".join(f"{row}\n" for row in _settings())
    problems = "".join(f"| `{row.code}` | {row.status} | {row.about} |\n" for row in PROBLEMS.values())
    return _HEAD + settings + _PROBLEMS + problems


def formats_text() -> str:
    """The table of formats in docs/traces.md."""
    rows = [
        f"| `{tool.name}` | {tool.tool}: {tool.made if tool.name == 'csv' else f'`{tool.made}`'} | {tool.address} "
        f"| {tool.sizes} | read: {tool.reads}; write: {tool.writes}; execute: {tool.executes} "
        f"| {', '.join(f'`{media}`' for media in tool.media)} |\n"
        for tool in FORMATS.values()
    ]
    return _FORMATS + "".join(rows)


def traces_text(page: str) -> str:
    """A page with its table of formats as it is today."""
    return _with(page, "formats", formats_text())


def client_text(page: str) -> str:
    """A page with its table of operations as it is today."""
    return _with(page, "operations", operations_text())


def _with(page: str, what: str, table: str) -> str:
    begin, end = f"<!-- {what}: made from the code -->\n", f"<!-- end of {what} -->\n"
    before, _, rest = page.partition(begin)
    return f"{before}{begin}{table}{end}{rest.partition(end)[2]}"


# Pages with tables from the code among what people wrote, and how each is to be.
_PAGES = ((TRACES, traces_text), (CLIENT, client_text), (REFERENCE.with_name("kvmi.md"), page_text))


def _settings() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        yield f"| `SUBPAGE_{name.upper()}` | {_type(field)} | {_default(name, field)} | {field.description} |"


def _type(field: FieldInfo) -> str:
    members = get_args(field.annotation) or (field.annotation,)
    kinds = [kind for member in members for kind in _values(member) if kind not in (type(None), Ellipsis)]
    if field.annotation is not None and getattr(field.annotation, "__origin__", None) is tuple:
        return "JSON list"
    names = {"str": "text", "Path": "path", "bool": "true or false", "int": "integer", "float": "number"}
    names["SecretStr"] = "secret"
    return " or ".join(names.get(kind.__name__, "text") if isinstance(kind, type) else f"`{kind}`" for kind in kinds)


def _values(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else (kind,)


def _default(name: str, field: FieldInfo) -> str:
    value = field.default
    if value is PydanticUndefined:
        return "a file below `~/.local/share`"
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and "bytes" in f"{name}{field.description}".lower() and value % MIB == 0 < value:
        return f"{value // GIB} GiB" if value % GIB == 0 else f"{value // MIB} MiB"
    return f"`{value}`" if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> int:
    """Write or check the page; 1 when it is not current."""
    parser = argparse.ArgumentParser(prog="python -m service.cli.reference", description=__doc__)
    parser.add_argument("--file", type=Path, default=REFERENCE, help="the page, docs/reference.md by default")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write the page")
    what.add_argument("--check", action="store_true", help="fail when the page is not current")
    options = parser.parse_args(arguments)
    texts = {options.file: reference_text()}
    for page, made in _PAGES:
        texts[page] = made(page.read_text(encoding="utf-8") if page.exists() else "")
    for file, text in texts.items():
        if options.write:
            file.write_text(text, encoding="utf-8")
        elif not file.exists() or file.read_text(encoding="utf-8") != text:
            print(f"{file} is not current: run python -m service.cli.reference --write", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
