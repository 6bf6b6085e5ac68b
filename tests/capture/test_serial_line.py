"""Symbols that come over a serial line of the guest's."""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Sequence

import pytest

from capture import serial_line
from capture.errors import CaptureError
from capture.serial_line import symbols_from

TEXT = b"".join(b"ffffffff8100%04x T function_%d\n" % (n, n) for n in range(3000))


def shown(pieces: Sequence[bytes]) -> bytes | None:
    """What comes of pieces, after which the line is closed."""
    ours, theirs = socket.socketpair()

    def write() -> None:
        with theirs:
            for piece in pieces:
                theirs.sendall(piece)

    writer = threading.Thread(target=write)
    writer.start()
    with ours:
        try:
            return symbols_from(ours, lambda: True)
        finally:
            ours.close()
            writer.join()


def test_text_ends_at_a_dot_and_a_gzip_file_by_itself() -> None:
    packed = gzip.compress(TEXT)
    assert shown([TEXT, b".\n"]) == TEXT
    assert shown([TEXT.replace(b"\n", b"\r\n"), b".\r\n"]) == TEXT
    assert shown([packed]) == shown([packed[:1], packed[1:7], packed[7:]]) == TEXT


def test_a_guest_that_ends_before_has_shown_none() -> None:
    assert shown([TEXT]) is None
    assert shown([gzip.compress(TEXT)[:-1]]) is None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert symbols_from(ours, lambda: False) is None


def test_what_a_tty_has_changed_and_what_is_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = bytearray(gzip.compress(TEXT))
    changed[40] ^= 0xFF
    with pytest.raises(CaptureError, match=r"no gzip file .*: a tty changes what it is given: stty raw"):
        shown([bytes(changed)])
    monkeypatch.setattr(serial_line, "_MOST", 1000)
    for content in (TEXT, gzip.compress(TEXT)):
        with pytest.raises(CaptureError, match="are more than"):
            shown([content])
