"""What can be wrong with a recording: with the machine it runs on, or with the QEMU that was asked for."""

from __future__ import annotations


class CaptureError(Exception):
    """The text says what is wrong and what to do."""
