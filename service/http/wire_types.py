"""Types on the wire: addresses, bitmaps and raw words are ``0x…`` strings out, strings or integers in.

``integer`` is where a stranger's text becomes an int, wherever it stands. ``int`` itself takes signs, underscores,
spaces and the digits of every script, and raises for more than 4,300 of them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.config import JsonDict
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_BARE = re.compile(r"[0-9a-fA-F]{1,16}")
# Wider than anything that has a meaning, zeros before it included.
_TEXT = re.compile(r"0x[0-9a-fA-F]{1,30}|[0-9]{1,32}")


def integer(text: str) -> int | None:
    """The number that ``text`` is in ASCII, ``0x`` and hexadecimal digits or decimal ones; None if it is none."""
    return int(text, 16 if text[:2] == "0x" else 10) if _TEXT.fullmatch(text) else None


def decimal(text: str, *, most: int) -> int | None:
    """The number from 0 to ``most`` that ``text`` is in decimal digits; None if it is none."""
    found = integer(text) if text[:2] != "0x" else None
    return found if found is not None and found <= most else None


class Word:
    """Annotation of an unsigned integer of ``bits`` bits. Booleans, floats and negative numbers are refused."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.limit = 1 << bits

    def parse(self, value: Any) -> int:
        """The integer meant by ``value``, an ``int`` or a hexadecimal (``0x…``) or decimal string."""
        number = integer(value) if type(value) is str else value
        if type(number) is not int:
            rule = "must be an integer, or a string of 0x and hexadecimal or of decimal digits"
            if type(value) is str and _BARE.fullmatch(value):
                rule += f"; hexadecimal is written with 0x before it: 0x{value.lower()}"
            raise PydanticCustomError("word", "{rule}", {"rule": rule})
        if not 0 <= number < self.limit:
            raise PydanticCustomError("word_range", "must fit in {bits} bits without a sign", {"bits": self.bits})
        return number

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        shown = core_schema.plain_serializer_function_ser_schema(
            hex, return_schema=core_schema.str_schema(), when_used="json"
        )
        return core_schema.no_info_plain_validator_function(self.parse, serialization=shown)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return self.told() if handler.mode == "serialization" else self.taken()

    def told(self) -> JsonDict:
        """The JSON Schema of replies."""
        digits = (self.bits + 3) // 4
        return {"type": "string", "pattern": f"^0x[0-9a-f]{{1,{digits}}}$", "examples": ["0x2000"]}

    def taken(self) -> JsonDict:
        """The JSON Schema of requests."""
        digits, decimals = (self.bits + 3) // 4, len(str(self.limit - 1))
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
PageNumber = Annotated[Hex64, Field(description="Number of a guest page: its address shifted right by 12.")]

ACCESS_NAMES = ("read", "write", "execute")


SOURCE_NAMES = ("guest", "emulated", "host")
KIND_NAMES = ("data", "read-modify-write", "paging-read", "paging-update", "shadow-stack")
LINEAR_NAMES = ("valid", "user", "writable", "execute-disable")
CIRCUMSTANCE_NAMES = ("nmi-unblocking", "spp-exempt", "delivery", "asynchronous")


class _Choice:
    """Annotation of one of ``names``: its position, as a number or in digits, or the name; a number on the way out."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.digits = tuple(str(position) for position in range(len(names)))

    def parse(self, value: Any) -> int:
        if type(value) is int and 0 <= value < len(self.names):
            return value
        if isinstance(value, str):
            for known in (self.names, self.digits):
                if value in known:
                    return known.index(value)
        words = [f"{name} ({position})" for position, name in enumerate(self.names)]
        raise PydanticCustomError("choice", "must be {words}", {"words": f"{', '.join(words[:-1])} or {words[-1]}"})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.parse)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        number = {"type": "integer", "minimum": 0, "maximum": len(self.names) - 1}
        if handler.mode == "serialization":
            return number
        return {"anyOf": [{"type": "string", "enum": [*self.names, *self.digits]}, number]}


class _Bits:
    """Annotation of a set of ``names``, bit 0 first: a number, or names with commas between them."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.limit = 1 << len(names)
        self.digits = tuple(map(str, range(self.limit)))

    def parse(self, value: Any) -> int:
        if isinstance(value, str):
            if value in self.digits:
                return self.digits.index(value)
            names = value.split(",")
            if len(set(names)) == len(names) and set(names) <= set(self.names):
                return sum(1 << self.names.index(name) for name in names)
        elif type(value) is int and 0 <= value < self.limit:
            return value
        raise PydanticCustomError(
            "bits",
            "must be 0 to {last}, or distinct names out of {names} with commas between them",
            {"last": self.limit - 1, "names": ", ".join(self.names)},
        )

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.parse)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        number = {"type": "integer", "minimum": 0, "maximum": self.limit - 1}
        if handler.mode == "serialization":
            return number
        name = f"({'|'.join(self.names)})"
        pattern = f"^({name}(,{name}){{0,{len(self.names) - 1}}}|[0-9]|1[0-5])$"
        return {"anyOf": [{"type": "string", "pattern": pattern}, number]}


class _Rights:
    """Annotation of read, write and execute: bits 0, 1 and 2 of a number, or letters with ``-`` for what is lacking."""

    letters = "rwx"

    def parse(self, value: Any) -> int:
        if type(value) is int and 0 <= value < 8:
            return value
        if isinstance(value, str) and re.fullmatch("r?-?w?-?x?-?", value) and len(value) <= 3:
            return sum(1 << position for position, letter in enumerate(self.letters) if letter in value)
        raise PydanticCustomError("rights", "must be 0 to 7, or letters out of rwx in that order, - where one lacks")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.parse)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        text = {"type": "string", "pattern": "^r?-?w?-?x?-?$", "maxLength": 3, "examples": ["r-x"]}
        return {"anyOf": [text, {"type": "integer", "minimum": 0, "maximum": 7}]}


Access = Annotated[int, _Choice(ACCESS_NAMES)]
Rights = Annotated[int, _Rights()]
Kind = Annotated[int, _Choice(KIND_NAMES)]
Linear = Annotated[int, _Bits(LINEAR_NAMES)]
CIRCUMSTANCES = (
    "What else is true of the access, where an exit depends on it: `nmi-unblocking` (1), by an IRET with NMIs blocked; "
    "`spp-exempt` (2), in a transaction or to an enclave; `delivery` (4), of an event; `asynchronous` (8) to the "
    "instruction. Names with commas between them, or the sum."
)
Circumstances = Annotated[int, _Bits(CIRCUMSTANCE_NAMES)]
Source = Annotated[int, _Choice(SOURCE_NAMES)]


class Document(BaseModel):
    """Base of every JSON body: unknown members are refused, and nothing is converted behind the client's back."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, json_schema_serialization_defaults_required=True
    )


def examples(*documents: Any) -> JsonDict:
    """Schema members that show ``documents``; for ``json_schema_extra``."""
    return {"examples": list(documents)}
