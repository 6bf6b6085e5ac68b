"""Asks /livez of a port until its standard input ends, and prints the longest wait in seconds and how often it asked.

A process of its own: one that prepares attacks would be waiting for itself.
"""

import select
import socket
import sys
import time

PAUSE = 0.01


def main() -> None:
    longest, asked = 0.0, 0
    request = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    connection = None
    while not select.select([sys.stdin], [], [], PAUSE)[0]:
        began = time.monotonic()
        try:
            connection = connection or socket.create_connection(("127.0.0.1", int(sys.argv[1])))
            connection.sendall(request)
            reply = connection.recv(1 << 16)
        except OSError:
            reply = b""
        if not reply:
            connection = None  # it has been answered as often as one connection may be, or the server is gone
            continue
        longest, asked = max(longest, time.monotonic() - began), asked + 1
    sys.stdout.write(f"{longest} {asked}\n")


main()
