"""The committed contract, and the list of its operations that the client has: ``python -m service.cli.openapi --write``
renews both, ``--check`` fails when one is stale."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from service.app import create_app
from service.settings import Settings

CONTRACT = Path(__file__).parents[2] / "openapi" / "openapi.json"
ROUTES = Path(__file__).parents[2] / "client" / "subpage" / "routes.json"

_WIDTH = 120


def contract_text() -> str:
    """The document as text: the same for the same sources, whatever the environment says."""
    return laid_out(create_app(Settings.model_construct()).openapi()) + "\n"


def routes_text(contract: str) -> str:
    """Method and path of every operation, by its id."""
    paths = json.loads(contract)["paths"]
    routes = {
        operation["operationId"]: [method.upper(), path] for path in paths for method, operation in paths[path].items()
    }
    return laid_out(dict(sorted(routes.items()))) + "\n"


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
    parser.add_argument("--routes", type=Path, default=ROUTES, help="client/subpage/routes.json by default")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write the contract")
    what.add_argument("--check", action="store_true", help="fail when the contract is not current")
    options = parser.parse_args(arguments)
    text = contract_text()
    texts = {options.file: text, options.routes: routes_text(text)}
    for file, current in texts.items():
        if options.write:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(current, encoding="utf-8")
        elif not file.exists() or file.read_text(encoding="utf-8") != current:
            print(f"{file} is not current: run python -m service.cli.openapi --write", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
