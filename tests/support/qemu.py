"""Which QEMU the tests of guests start: the variable QEMU names it, and otherwise it is the installed one."""

from __future__ import annotations

import os

QEMU = os.environ.get("QEMU") or "qemu-system-x86_64"
