"""``python -m service.cli.child PARENT …``: the command line in a process that ends when its parent does, however."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> None:
    """Arrange for the end, then do what the other arguments say."""
    parent = int(sys.argv.pop(1))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        sys.exit(1)
    from service.cli.app import main as command_line

    command_line()


if __name__ == "__main__":
    main()
