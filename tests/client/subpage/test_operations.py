"""Every operation of the contract can be reached, and it is said how."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import service
import subpage
from service.cli.client_calls import methods, table
from subpage.core import filled

ROOT = Path(__file__).parents[3]
CONTRACT = json.loads((ROOT / "openapi" / "openapi.json").read_text(encoding="utf-8"))
OPERATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    operation["operationId"]: (method.upper(), path, operation)
    for path, item in CONTRACT["paths"].items()
    for method, operation in item.items()
}


def test_the_client_is_of_the_release() -> None:
    assert subpage.__version__ == service.__version__ == CONTRACT["info"]["version"]


def test_every_operation_has_its_route() -> None:
    assert {name: (method, path) for name, (method, path, _) in OPERATIONS.items()} == subpage.ROUTES


def test_every_operation_is_a_method_or_a_call() -> None:
    found = methods()
    assert set(found) == set(OPERATIONS)
    assert {how for names in found.values() for how in names if how.startswith(("Client.", "Vm.", "Trace.", "Job."))}
    assert found["getSubpages"] == ["Vm.subpages"]
    assert found["getTlb"] == ['client.call("getTlb", path={"vm": …, "n": …})']


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_no_operation_is_out_of_reach(name: str) -> None:
    method, path, operation = OPERATIONS[name]
    names = re.findall(r"{(\w+)}", path)
    assert filled(name, path, dict.fromkeys(names, "a/b")) == re.sub(r"{\w+}", "a%2Fb", path)
    if method == "POST":  # may be sent again
        assert {"$ref": "#/components/parameters/IdempotencyKey"} in operation.get("parameters", [])


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "client.md").read_text(encoding="utf-8")
    assert table() in page


def test_what_the_path_lacks_is_told() -> None:
    with pytest.raises(subpage.BadInput, match="needs 'trace'"):
        filled("getTrace", subpage.ROUTES["getTrace"].path, {"vm": "vm_1"})
    with pytest.raises(subpage.BadInput, match="has no 'wm'"):
        filled("getVm", subpage.ROUTES["getVm"].path, {"wm": "vm_1"})
    with pytest.raises(subpage.BadInput, match="'vm' is empty"):
        filled("getVm", subpage.ROUTES["getVm"].path, {"vm": ""})
