"""The committed contract: current, valid, complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from service import openapi
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
    file = tmp_path / "sub" / "openapi.json"
    assert openapi.main(["--check", "--file", str(file)]) == 1
    assert openapi.main(["--write", "--file", str(file)]) == 0
    assert openapi.main(["--check", "--file", str(file)]) == 0
    file.write_text("{}", encoding="utf-8")
    assert openapi.main(["--check", "--file", str(file)]) == 1
    assert "not current" in capsys.readouterr().err


def test_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    text = openapi.contract_text()
    monkeypatch.setenv("SUBPAGE_MAX_VMS", "3")
    monkeypatch.setenv("SUBPAGE_PORT", "nonsense")
    assert openapi.contract_text() == text


def test_is_valid_openapi() -> None:
    OpenAPIV31SpecValidator(contract().document).validate()


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
