"""Curves of ``bench.curves`` as pictures, both axes logarithmic, the same bytes for the same figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure


def draw(curves: Mapping[str, Any], directory: Path) -> Iterator[Path]:
    """``scale-NAME.svg`` for each curve; needs matplotlib (``subpage[bench]``)."""
    # Neither a date nor random identifiers: a picture changes with its figures alone.
    mpl.rcParams.update({"svg.hashsalt": "subpage", "font.size": 9})
    directory.mkdir(parents=True, exist_ok=True)
    for name, curve in curves.items():
        figure = Figure(figsize=(4.8, 3.0), layout="constrained")
        axes = figure.add_subplot()
        sizes, values = zip(*curve["points"], strict=True)
        axes.loglog(sizes, values, marker="o", color="#4338ca", linewidth=1.5)
        axes.set(xlabel=curve["x"], ylabel=curve["y"])
        axes.grid(visible=True, which="major", color="#d4d4d8", linewidth=0.5)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        path = directory / f"scale-{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        yield path
