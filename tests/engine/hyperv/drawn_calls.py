"""Flush calls for hypothesis to draw."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.engine.hyperv.flush_machine import ENTRIES, PAGE

ADDRESSES = [linear for _, linear, _, _ in ENTRIES.values()]

BIT = [1 << at for at in range(64)]

ranges = st.builds(
    lambda base, pages, low: (base + pages * PAGE) % (1 << 64) & ~0xFFF | low,
    st.sampled_from([*ADDRESSES, *ADDRESSES, 0, 1 << 47, 0xAAAAAAAAAAAAA000, (1 << 64) - PAGE]),
    st.one_of(st.integers(-3, 3), st.integers(-5000, 5000)),
    st.one_of(st.sampled_from([0, 0, 1, 0x7FF, 0x800, 0x807, 0xFFF]), st.integers(0, 0xFFF)),
)
# What a field may hold, and what makes a call another or none at all; tried one at a time.
FIELDS: dict[str, st.SearchStrategy[int]] = {
    "code": st.sampled_from([2, 3, 0x13, 0x14]),
    "space": st.sampled_from([0, 0x1000, 0x2000, 0x1FFF, 0x3000]),
    "mask": st.one_of(st.integers(0, 15), st.sampled_from([1 << 63, (1 << 64) - 1])),
    "format": st.sampled_from([0, 0, 0, 1]),
}
ODD: dict[str, st.SearchStrategy[int]] = {
    "code": st.sampled_from([0, 1, 4, 0x12, 0x15, 0xBEEF]),
    "space": st.sampled_from(BIT[45:]),
    "flags": st.one_of(st.integers(0, 15), st.sampled_from(BIT[4:])),
    "mask": st.just(0),
    "format": st.sampled_from([2, 1 << 63]),
    "valid": st.sampled_from(BIT),
    "reps": st.sampled_from([0, 1, 0xFFF]),
    "start": st.integers(1, 3),
    "variable": st.sampled_from([0, 1, 65, 0x3FF]),
    "reserved": st.sampled_from([1 << bit for bit in (27, 28, 29, 30, 31, 44, 45, 46, 47, 60, 61, 62, 63)]),
}


@st.composite
def calls(draw: st.DrawFn) -> tuple[int, list[int]]:
    """An input value and the words of a block: good, or with one field that is not."""
    wrong = draw(st.sampled_from([None] * 8 + sorted(ODD)))

    def pick(name: str, good: st.SearchStrategy[int] | int) -> int:
        found = ODD[name] if name == wrong else good
        return found if isinstance(found, int) else draw(found)

    code = pick("code", FIELDS["code"])
    rep, ex = code in (3, 0x14), code in (0x13, 0x14)
    block = [
        pick("space", FIELDS["space"]),
        pick("flags", st.sampled_from([0, 1, 2, 3, 8, 10] if rep else [0, 1, 2, 4, 6])),
    ]
    banks = 0
    if ex:
        kind = pick("format", FIELDS["format"])
        chosen = draw(st.sets(st.sampled_from([0, 0, 1, 2, 16, 63]), min_size=1 - kind % 2, max_size=3))
        banks = len(chosen)
        valid = sum(1 << bank for bank in chosen)
        block += [kind, valid ^ (draw(ODD["valid"]) if wrong == "valid" else 0)]
        block += [pick("mask", FIELDS["mask"]) for _ in chosen]
    else:
        block.append(pick("mask", FIELDS["mask"]))
    items = draw(st.lists(ranges, min_size=1, max_size=18)) if rep else []
    control = code | draw(st.booleans()) << 16 | pick("variable", banks) << 17 | pick("reps", len(items)) << 32
    return control | pick("start", 0) << 48 | pick("reserved", 0), [*block, *items]
