"""Numbers on the wire: addresses, bitmaps and raw words are ``0x…`` strings out, strings or integers in."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.config import JsonDict
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_TEXT = re.compile(r"(?:0x[0-9a-fA-F]+|[0-9]+)")


class Word:
    """Annotation of an unsigned integer of ``bits`` bits. Booleans, floats and negative numbers are refused."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.limit = 1 << bits

    def parse(self, value: Any) -> int:
        """The integer meant by ``value``, an ``int`` or a hexadecimal (``0x…``) or decimal string."""
        if type(value) is str and len(value) <= 32 and _TEXT.fullmatch(value):
            number = int(value, 16 if value[:2] == "0x" else 10)
        elif type(value) is int:
            number = value
        else:
            raise PydanticCustomError(
                "word", "must be an integer, or a string of 0x and hexadecimal or of decimal digits"
            )
        if not 0 <= number < self.limit:
            raise PydanticCustomError("word_range", "must fit in {bits} bits without a sign", {"bits": self.bits})
        return number

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        shown = core_schema.plain_serializer_function_ser_schema(
            hex, return_schema=core_schema.str_schema(), when_used="json"
        )
        return core_schema.no_info_plain_validator_function(self.parse, serialization=shown)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        digits = (self.bits + 3) // 4
        if handler.mode == "serialization":
            return {"type": "string", "pattern": f"^0x[0-9a-f]{{1,{digits}}}$", "examples": ["0x2000"]}
        decimals = len(str(self.limit - 1))
        pattern = f"^(0x[0-9a-fA-F]{{1,{digits}}}|[0-9]{{1,{decimals}}})$"
        return {
            "anyOf": [
                {"type": "string", "pattern": pattern},
                {"type": "integer", "minimum": 0, "maximum": self.limit - 1},
            ],
            "examples": ["0x2000"],
        }


Hex64 = Annotated[int, Word(64)]
Hex32 = Annotated[int, Word(32)]

ACCESS_NAMES = ("read", "write", "execute")


class _AccessKind:
    """Annotation of an access: 0, 1, 2 or ``read``, ``write``, ``execute``; a number on the way out."""

    def parse(self, value: Any) -> int:
        if type(value) is int and 0 <= value < len(ACCESS_NAMES):
            return value
        if isinstance(value, str):
            if value in ACCESS_NAMES:
                return ACCESS_NAMES.index(value)
            if value in ("0", "1", "2"):
                return int(value)
        raise PydanticCustomError("access", "must be read (0), write (1) or execute (2)")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.parse)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        number = {"type": "integer", "minimum": 0, "maximum": 2}
        if handler.mode == "serialization":
            return number
        return {"anyOf": [{"type": "string", "enum": [*ACCESS_NAMES, "0", "1", "2"]}, number]}


Access = Annotated[int, _AccessKind()]


class Document(BaseModel):
    """Base of every JSON body: unknown members are refused, and nothing is converted behind the client's back."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, json_schema_serialization_defaults_required=True
    )


def examples(*documents: Any) -> JsonDict:
    """Schema members that show ``documents``; for ``json_schema_extra``."""
    return {"examples": list(documents)}
