"""A serial line of the guest's that ends here: a kernel shows its symbols on it, and hears when they are taken."""

from __future__ import annotations

import select
import socket
import zlib
from collections.abc import Callable

from capture.errors import CaptureError

_GZIP = b"\x1f\x8b"
_END = b"\n.\n"
_MOST = 1 << 26  # bytes of symbols: those of a kernel with all its modules are 10 MB
_LOOK_SECONDS = 0.1


def symbols_from(line: socket.socket, going: Callable[[], bool]) -> bytes | None:
    """What the guest writes: a gzip file, or text up to a line that is a dot. None: it ended before. Raises
    CaptureError."""
    data, text, fed = bytearray(), bytearray(), 0
    unpack = zlib.decompressobj(wbits=31)
    while going():
        if not select.select([line], [], [], _LOOK_SECONDS)[0]:
            continue
        if not (piece := line.recv(1 << 16)):
            break
        data += piece
        if len(data) < len(_GZIP):
            continue
        if data.startswith(_GZIP):
            try:
                text += unpack.decompress(data[fed:], _MOST)
                fed = len(data)
            except zlib.error as error:
                rule = "a tty changes what it is given: stty raw -F /dev/ttyS… first"
                raise CaptureError(f"the guest's symbols are no gzip file ({error}): {rule}") from None
            if unpack.eof:
                return bytes(text)
        elif (found := data.replace(b"\r\n", b"\n")).endswith(_END):
            return bytes(found[: -len(_END) + 1])
        if max(len(data), len(text)) >= _MOST:
            raise CaptureError(f"the guest's symbols are more than {_MOST >> 20} MiB")
    return None
