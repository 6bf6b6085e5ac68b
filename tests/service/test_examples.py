"""The examples that need nothing but the service, run against it."""

from __future__ import annotations

import pytest

from examples import forgotten_flush
from tests.service.running import Running


def test_the_forgotten_flush_is_found(service: Running, capsys: pytest.CaptureFixture[str]) -> None:
    forgotten_flush.main(str(service.client.base_url))
    first, missed, stale, hit, fresh = capsys.readouterr().out.splitlines()
    assert first == "vCPU 1 writes to 0x11000"
    assert missed == "flush of VPs 0b10: targets [], 0 translations dropped"
    assert stale == "vCPU 1 writes to 0x11000: a stale translation, the flush missed VP 5"
    assert hit == "flush of VPs 0b100000: targets [5], 1 translations dropped"
    assert fresh == "vCPU 1 writes to 0x12000: as mapped"
