"""The committed contract: current, valid, complete."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from service.cli import openapi
from service.problems import MEDIA_TYPE, PROBLEMS
from tests.contract.client import Contract, contract

OPERATIONS = [
    pytest.param(path, method, id=f"{method.upper()} {path}")
    for path, item in contract().document["paths"].items()
    for method in item
]


def operation(path: str, method: str) -> dict[str, Any]:
    found: dict[str, Any] = contract().document["paths"][path][method]
    return found


def test_is_current() -> None:
    assert openapi.main(["--check"]) == 0


def test_write_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, routes = tmp_path / "sub" / "openapi.json", tmp_path / "routes.json"
    files = ["--file", str(file), "--routes", str(routes)]
    assert openapi.main(["--check", *files]) == 1
    assert openapi.main(["--write", *files]) == 0
    assert openapi.main(["--check", *files]) == 0
    for stale in (routes, file):
        stale.write_text("{}", encoding="utf-8")
        assert openapi.main(["--check", *files]) == 1
        assert f"{stale} is not current" in capsys.readouterr().err


def test_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    text = openapi.contract_text()
    monkeypatch.setenv("SUBPAGE_MAX_VMS", "3")
    monkeypatch.setenv("SUBPAGE_PORT", "nonsense")
    assert openapi.contract_text() == text


def test_is_valid_openapi() -> None:
    OpenAPIV31SpecValidator(contract().committed).validate()


def test_operation_ids_are_unique() -> None:
    ids = [item["operationId"] for path in contract().document["paths"].values() for item in path.values()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_operation_is_described(path: str, method: str) -> None:
    described = operation(path, method)
    tags = {tag["name"] for tag in contract().document["tags"]}
    assert set(described["tags"]) <= tags and described["tags"]
    assert described["summary"] != described["operationId"]
    for parameter in described.get("parameters", []):
        assert parameter["description"], parameter["name"]
    assert any(status.startswith("2") for status in described["responses"])


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_bodies_have_valid_examples(path: str, method: str) -> None:
    described = operation(path, method)
    bodies = [described["requestBody"]] if "requestBody" in described else []
    for body in (*bodies, *described["responses"].values()):
        for media, content in body.get("content", {}).items():
            if media not in ("application/json", MEDIA_TYPE):
                continue
            examples = (
                [content["example"]]
                if "example" in content
                else [item["value"] for item in content["examples"].values()]
            )
            assert examples
            for example in examples:
                contract().valid(example, content["schema"], media)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_problems_are_of_the_table(path: str, method: str) -> None:
    for status, reply in operation(path, method)["responses"].items():
        if status < "400":
            continue
        for code, example in reply["content"][MEDIA_TYPE]["examples"].items():
            assert PROBLEMS[code].status == int(status)
            assert example["value"]["type"] == PROBLEMS[code].uri


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_request_and_main_reply_have_an_example(path: str, method: str) -> None:
    described = operation(path, method)
    bodies = [described["requestBody"]] if "requestBody" in described else []
    bodies += [reply for status, reply in described["responses"].items() if status < "300" and "content" in reply]
    for body in bodies:
        assert any("example" in content or "examples" in content for content in body["content"].values())


def must_be_documented(path: str, method: str, described: dict[str, Any]) -> set[str]:
    """The statuses that any such call can end in, whatever it is about."""
    needed = {"406"} if any("content" in reply for s, reply in described["responses"].items() if s < "300") else set()
    if path.startswith("/v1/"):
        needed |= {"401", "403", "429", "503"}
    if path.endswith("/kvmi"):
        needed |= {"404"}  # an attachment is the service's, and no change of the machine
    elif "{vm}" in path:
        needed |= {"404"} if method == "get" else {"404", "409"}
        if method in ("put", "patch", "delete"):
            needed |= {"412", "428"}
    if "requestBody" in described:
        needed |= {"413", "415", "422"}
        if "application/json" in described["requestBody"]["content"]:
            needed |= {"400"}
    if method == "post" or any(parameter["in"] == "query" for parameter in described.get("parameters", [])):
        needed |= {"422"}
    return needed


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_refusals_that_any_such_call_can_meet_are_documented(path: str, method: str) -> None:
    described = operation(path, method)
    assert must_be_documented(path, method, described) <= set(described["responses"])


def test_links_lead_somewhere() -> None:
    """Each names an operation and parameters that its path has; no call about a machine is out of reach."""
    paths = {item["operationId"]: path for path, ops in contract().document["paths"].items() for item in ops.values()}
    reached = set()
    for path, method in (case.values for case in OPERATIONS):
        for reply in operation(str(path), str(method))["responses"].values():
            for link in reply.get("links", {}).values():
                target = paths[link["operationId"]]
                assert all(f"{{{name}}}" in target for name in link["parameters"])
                assert "vm" in link["parameters"]
                reached.add(link["operationId"])
    assert reached == {name for name, path in paths.items() if "{vm}" in path}


def test_classes_made_of_schemas_have_names_of_their_own() -> None:
    schemas = contract().document["components"]["schemas"]
    assert len({name.lower() for name in schemas}) == len(schemas)
    for name, schema in schemas.items():
        assert re.fullmatch("[A-Z][A-Za-z0-9]+", name), "a part of one direction, or none that a class can have"
        assert name.lower() not in {member.replace("_", "") for member in schema.get("properties", {})}


def test_schema_examples_are_valid() -> None:
    for name, schema in contract().document["components"]["schemas"].items():
        for example in schema.get("examples", []):
            contract().valid(example, schema, name)


def test_no_framework_error_shape_is_left() -> None:
    assert "HTTPValidationError" not in json.dumps(contract().document)


def test_the_checker_checks() -> None:
    checker = Contract(contract().document)
    schema = {"$ref": "#/components/schemas/Spp"}
    checker.valid({"active": True}, schema, "spp")
    with pytest.raises(AssertionError, match="spp"):
        checker.valid({"active": 3}, schema, "spp")
