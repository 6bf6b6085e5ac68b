"""Subpage's client: machines whose memory is protected by 128 bytes, from Python.

    >>> from subpage import Client
    >>> client = Client(url)
    >>> vm = client.create_vm("guest", memory="16MiB")
    >>> found = vm.protect([{"name": "table", "gpa": 0x2000, "size": 256}], name="kernel")
    >>> trace = vm.replay([{"gpa": 0x2000}, {"gpa": 0x2800}])
    >>> trace.violations, trace.page_granular_violations
    (1, 2)
    >>> vm.delete()
    >>> client.close()

``AsyncClient`` is the same for asyncio. See docs/client.md.
"""

from subpage.bitmaps import Bitmap
from subpage.client import AsyncClient, Client
from subpage.compacting import compact
from subpage.errors import (
    BadInput,
    Error,
    Forbidden,
    Interrupted,
    NotFound,
    NotInstalled,
    NotSubpage,
    Problem,
    StreamBroken,
    TooLarge,
    Unauthenticated,
    Unreachable,
    Untrusted,
    VersionMismatch,
)  # fmt: skip
from subpage.footprints import AsyncFootprint, Footprint
from subpage.html import Document
from subpage.introspection import AsyncTool, Question, Tool
from subpage.jobs import AsyncJob, Job
from subpage.machines import AsyncVm, Vm
from subpage.modes import AsyncStream, Stream
from subpage.routes import ROUTES, VERSION
from subpage.traces import AsyncTrace, Trace
from subpage.wire import Reply

__version__ = VERSION

__all__ = [
    "ROUTES", "AsyncClient", "AsyncFootprint", "AsyncJob", "AsyncStream", "AsyncTool", "AsyncTrace", "AsyncVm",
    "BadInput", "Bitmap", "Client", "Document", "Error", "Footprint", "Forbidden", "Interrupted", "Job", "NotFound",
    "NotInstalled", "NotSubpage", "Problem", "Question", "Reply", "Stream", "StreamBroken", "TooLarge", "Tool",
    "Trace", "Unauthenticated", "Unreachable", "Untrusted", "VersionMismatch", "Vm", "__version__", "compact",
]  # fmt: skip
