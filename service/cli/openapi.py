"""The committed contract: ``python -m service.cli.openapi --write`` renews it, ``--check`` fails when it is stale."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from service.app import create_app
from service.settings import Settings

CONTRACT = Path(__file__).parents[2] / "openapi" / "openapi.json"

_WIDTH = 120


def contract_text() -> str:
    """The document as text: the same for the same sources, whatever the environment says."""
    return laid_out(create_app(Settings.model_construct()).openapi()) + "\n"


def laid_out(part: Any, indent: str = "", before: int = 0) -> str:
    """JSON in which what fits on a line is on one, and the rest has a line for each member.

    ``before`` is how much stands on the line already.
    """
    line = json.dumps(part, ensure_ascii=False)
    if not isinstance(part, dict | list) or not part or before + len(line) < _WIDTH:
        return line
    inner = indent + " "
    if isinstance(part, list):
        return "[\n" + ",\n".join(inner + laid_out(item, inner, len(inner)) for item in part) + f"\n{indent}]"
    members = ((f"{inner}{json.dumps(name)}: ", member) for name, member in part.items())
    return "{\n" + ",\n".join(key + laid_out(member, inner, len(key)) for key, member in members) + f"\n{indent}}}"


def main(arguments: list[str] | None = None) -> int:
    """Write or check the contract; 1 when it is not current."""
    parser = argparse.ArgumentParser(prog="python -m service.cli.openapi", description=__doc__)
    parser.add_argument("--file", type=Path, default=CONTRACT, help="the contract, openapi/openapi.json by default")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write the contract")
    what.add_argument("--check", action="store_true", help="fail when the contract is not current")
    options = parser.parse_args(arguments)
    text = contract_text()
    if options.write:
        options.file.parent.mkdir(parents=True, exist_ok=True)
        options.file.write_text(text, encoding="utf-8")
        return 0
    if not options.file.exists() or options.file.read_text(encoding="utf-8") != text:
        print(f"{options.file} is not current: run python -m service.cli.openapi --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
