"""Blobs of nested state for hypothesis to draw."""

from __future__ import annotations

from hypothesis import strategies as st

from engine.arch.vmcs12 import VMCS12
from tests.engine.nested.support import (
    EV,
    GM,
    MIN32,
    MIN64,
    NONE,
    RP,
    SHADOW_WORD,
    SHADOWING,
    blob,
    vmcs12,
)

BEFORE_THE_POINT_OF_NO_RETURN = {
    *("G0", "G1", "G2", "G3", "G4", "V1", "V2a", "V2b", "V2c"),
    *("V3a", "V3b", "V4", "V5", "V5n", "V6", "V7", "V8"),
}

addresses = st.sampled_from([0, 1, 0x1000, 0x2000, 0x5000, 1 << 38, 1 << 39, NONE, NONE - 1]) | st.integers(0, NONE)
flags = st.sampled_from([0, GM, GM | RP, EV, GM | EV, RP, 8, 0x100, 0x10F]) | st.integers(0, 0xFFFF)
patches = st.dictionaries(st.sampled_from([field.name for field in VMCS12.named]), st.integers(0, NONE), max_size=4)


@st.composite
def blobs(draw: st.DrawFn) -> bytes:
    """Blobs near the ones that matter: valid pages with some fields changed, cut or extended at will."""
    page = draw(st.sampled_from([{}, MIN32, MIN64, SHADOWING]))
    data = vmcs12({**page, **draw(patches)}) if draw(st.booleans()) else vmcs12(page)
    whole = blob(
        flags=draw(flags),
        format=draw(st.sampled_from([0, 0, 0, 0, 1, 2, 0xFFFF])),
        size=draw(
            st.sampled_from([0, 127, 128, 1125, 1126, 4224, 5221, 5222, 8320, 0xFFFF_FFFF]) | st.integers(0, 9000)
        ),
        vmxon=draw(addresses),
        vmcs12_pa=draw(addresses),
        smm=draw(st.sampled_from([0, 0, 0, 1, 2, 3, 4, 0xFFFC])),
        hdr_flags=draw(st.sampled_from([0, 0, 1, 2])),
        deadline=draw(addresses),
        data=data,
        shadow=draw(st.sampled_from([b"", vmcs12(revision=SHADOW_WORD), bytes(4096)])),
    )
    return whole[: draw(st.sampled_from([len(whole), 128, 1126, 4224]) | st.integers(0, len(whole)))]
