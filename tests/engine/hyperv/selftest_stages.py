"""The stages of the kernel's hyperv_tlb_flush test."""

from __future__ import annotations

from typing import Any

from tests.engine.hyperv.flush_machine import words
from tests.engine.hyperv.guests import TEST_PAGE

W1, W2 = 1, 2
TP = TEST_PAGE


def xmm(*halves: int) -> dict[str, Any]:
    halves += (0,) * (12 - len(halves))
    return {"xmm": tuple(halves[at] | halves[at + 1] << 64 for at in range(0, 12, 2))}


# hyperv_tlb_flush, stage by stage: registers, block, workers that must see the new mapping
STAGES = [
    ({"rcx": 0x2}, words(0, 2, 4), (W1,)),
    ({"rcx": 0x100000003}, words(0, 2, 4, TP), (W1,)),
    ({"rcx": 0x2}, words(0, 3, 0), (W1, W2)),
    ({"rcx": 0x100000003}, words(0, 3, 0, TP), (W1, W2)),
    ({"rcx": 0x20013}, words(0, 2, 0, 2, 2), (W2,)),
    ({"rcx": 0x100020014}, words(0, 2, 0, 2, 2, TP), (W2,)),
    ({"rcx": 0x40013}, words(0, 2, 0, 3, 4, 2), (W1, W2)),
    ({"rcx": 0x100040014}, words(0, 2, 0, 3, 4, 2, TP), (W1, W2)),
    ({"rcx": 0x13}, words(0, 2, 1, 0), (W1, W2)),
    ({"rcx": 0x100000014}, words(0, 2, 1, 0, TP), (W1, W2)),
    ({"rcx": 0x10002, "r8": 2, **xmm(4)}, None, (W1,)),
    ({"rcx": 0x100010003, "r8": 2, **xmm(4, TP)}, None, (W1,)),
    ({"rcx": 0x10002, "r8": 3}, None, (W1, W2)),
    ({"rcx": 0x100010003, "r8": 3, **xmm(0, TP)}, None, (W1, W2)),
    ({"rcx": 0x30013, "r8": 2, **xmm(0, 2, 2)}, None, (W2,)),
    ({"rcx": 0x100030014, "r8": 2, **xmm(0, 2, 2, TP)}, None, (W2,)),
    ({"rcx": 0x50013, "r8": 2, **xmm(0, 3, 4, 2)}, None, (W1, W2)),
    ({"rcx": 0x100050014, "r8": 2, **xmm(0, 3, 4, 2, TP)}, None, (W1, W2)),
    ({"rcx": 0x10013, "r8": 2, **xmm(1, 0)}, None, (W1, W2)),
    ({"rcx": 0x100010014, "r8": 2, **xmm(1, 0, TP)}, None, (W1, W2)),
]
