"""Numbers as no client writes them."""

from __future__ import annotations

# Wrong wherever a number is wanted, or as large as 64 bits are.
HOSTILE_NUMBERS = (
    *("9" * 5000, "0x" + "f" * 5000, "-1", "-" + "9" * 25, str(1 << 64), hex((1 << 64) - 1), "1e400", "nan", "0x"),
    *("1_0", "\N{SUPERSCRIPT TWO}", "\N{ARABIC-INDIC DIGIT THREE}", "\x00", "1\n", " 1", "a" * 5000),
)
