"""A flush call by its fields, as registers and as the bytes of its block: what a guest's kernel would have done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.arch import hypercall as hv
from engine.errors import InvalidValue

_WORD = (1 << 64) - 1
_CODES = {call.name: call.code for call in hv.CALLS.values()}


@dataclass(frozen=True)
class VpSet:
    """HV_VP_SET as it is in a block: nothing has to fit."""

    format: int = hv.SET_SPARSE
    valid_banks: int = 0
    banks: tuple[int, ...] = ()


@dataclass(frozen=True)
class CallFields:
    """Fields of a call. None where a count follows from the rest: banks of the set, ranges of the list."""

    code: int
    fast: bool = False
    rep_start: int = 0
    rep_count: int | None = None
    variable_header: int | None = None
    nested: bool = False
    address_space: int = 0
    flags: int = 0
    processor_mask: int = 0
    vp_set: VpSet = field(default_factory=VpSet)
    ranges: tuple[int, ...] = ()

    def control(self) -> int:
        """The input value. Raises InvalidValue for a field that its bits cannot hold."""
        call = hv.CALLS.get(self.code)
        reps = self.rep_count
        if reps is None:
            reps = len(self.ranges) if call is not None and call.rep else 0
        variable = self.variable_header
        if variable is None:
            variable = len(self.vp_set.banks) if call is not None and call.sparse else 0
        for name, value, limit in (
            ("code", self.code, hv.CODE_MASK),
            ("variable_header", variable, hv.VARIABLE_MASK),
            ("rep_count", reps, hv.REPS_MASK),
            ("rep_start", self.rep_start, hv.REPS_MASK),
        ):
            if not 0 <= value <= limit:
                raise InvalidValue(f"must be 0 to {limit:#x}", field=name, value=value)
        return (
            self.code
            | (hv.FAST if self.fast else 0)
            | variable << hv.VARIABLE_SHIFT
            | (hv.NESTED if self.nested else 0)
            | reps << hv.REPS_SHIFT
            | self.rep_start << hv.START_SHIFT
        )

    def words(self) -> tuple[int, ...]:
        """The block. Raises InvalidValue for a word of more than 64 bits."""
        call = hv.CALLS.get(self.code)
        head: Sequence[int] = (self.address_space, self.flags)
        if call is not None and call.sparse:
            head = (*head, self.vp_set.format, self.vp_set.valid_banks, *self.vp_set.banks)
        elif call is None or not call.second_level:
            head = (*head, self.processor_mask)
        words = (*head, *self.ranges)
        for word in words:
            if not 0 <= word <= _WORD:
                raise InvalidValue("must have words of 64 bits", field="input", value=word)
        return words

    def block(self) -> bytes:
        """The bytes of the block in memory order."""
        return b"".join(word.to_bytes(hv.WORD_BYTES, "little") for word in self.words())

    def fast_registers(self) -> tuple[int, int, tuple[int, ...]]:
        """RDX, R8 and the XMM registers of a fast call. Raises InvalidValue for a block that they cannot hold."""
        words = self.words()
        if len(words) > hv.FAST_WORDS:
            raise InvalidValue(
                f"must fit in registers with the rest of the block, {hv.FAST_WORDS} words",
                field="ranges",
                value=len(words),
            )
        words += (0,) * (hv.FAST_WORDS - len(words))
        return words[0], words[1], tuple(words[at] | words[at + 1] << 64 for at in range(2, hv.FAST_WORDS, 2))


def code_of(name: str) -> int:
    """The code of a call by the name that the specification gives it. Raises InvalidValue."""
    if name not in _CODES:
        raise InvalidValue(f"must be one of {', '.join(_CODES)}", field="call", value=name)
    return _CODES[name]
