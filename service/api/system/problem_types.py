"""The problem types, at the URIs that problems give as their ``type``."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from pydantic import ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import NotFound
from service import problems
from service.api.common import documented, json_response, router
from service.http.wire_types import Document, examples

routes = router("service", "/problems", reads="public")

_REPLY = {
    "type": "/problems/vm-busy",
    "code": "vm-busy",
    "status": 409,
    "title": "VM busy",
    "about": "Another mutation of the machine did not end in time.",
}


class ProblemType(Document):
    """A kind of problem."""

    model_config = ConfigDict(json_schema_extra=examples(_REPLY))

    type: str = Field(description="Relative URI of this entry.")
    code: str = Field(description="Slug, as in `code` of a problem.")
    status: int = Field(description="The HTTP status it comes with.")
    title: str = Field(description="Its name.")
    about: str = Field(description="What it means.")

    @classmethod
    def of(cls, problem: problems.ProblemType) -> ProblemType:
        return cls(type=problem.uri, code=problem.code, status=problem.status, title=problem.title, about=problem.about)


class ProblemTypes(Document):
    """All kinds of problems."""

    model_config = ConfigDict(json_schema_extra=examples({"problems": [_REPLY]}))

    problems: list[ProblemType] = Field(description="By status.")


@routes.get(
    "",
    operation_id="listProblemTypes",
    summary="List problem types",
    responses=documented({200: {"model": ProblemTypes, "description": "All of them."}}),
)
async def list_problem_types() -> Response:
    return json_response(ProblemTypes(problems=[ProblemType.of(problem) for problem in problems.PROBLEMS.values()]))


@routes.get(
    "/{code}",
    operation_id="getProblemType",
    summary="Read a problem type",
    responses=documented({200: {"model": ProblemType, "description": "The problem type."}}, "not-found"),
)
async def get_problem_type(
    request: Request, code: Annotated[str, Path(description="Slug of the problem.", examples=["vm-busy"])]
) -> Response:
    if code not in problems.PROBLEMS:
        raise NotFound("must be the code of a problem type", field="code", value=code)
    return json_response(ProblemType.of(problems.PROBLEMS[code]))
