"""What commands exit with: one table. ``docs/command-line.md`` shows it; a test compares the two."""

from __future__ import annotations

from enum import IntEnum


class Status(IntEnum):
    """Exit statuses; ``serve`` has two of its own meanings for 2 and 3, as the table says."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NO_ADDRESS = 3
    NO_SERVICE = 4
    NOT_ALLOWED = 5
    NOT_FOUND = 6
    INTERRUPTED = 130
    NO_READER = 141


MEANINGS = {
    Status.DONE: "done; what follows (`events --follow`, `attach`) has been ended by Ctrl-C",
    Status.FAILED: "it could not be done: refused by the service, or a file is not what it should be; "
    "`policy check` found something without memory",
    Status.USAGE: "the command line or a setting is wrong",
    Status.NO_ADDRESS: "`serve` cannot listen there, for one because the port is in use",
    Status.NO_SERVICE: "no service: nothing answers, or something else; TLS is not to be trusted; the connection broke",
    Status.NOT_ALLOWED: "a token is needed, or its scope does not include this",
    Status.NOT_FOUND: "no such machine, result, protection or job",
    Status.INTERRUPTED: "interrupted by Ctrl-C; what was under way has been cancelled",
    Status.NO_READER: "whoever read the output has left, as `head` does",
}
