"""``python -m service.runtime.cluster_child FD``: has a cluster build a footprint, and writes its file to FD.

A process of its own, because Ray ends its process where it loses its cluster, and so that it can be killed. What is
wanted is a line of JSON on standard input; the process ends when that does. It tells how far it is, and how it ended,
in lines of JSON on standard output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from engine.errors import InvalidValue, LimitExceeded
from scale import build as building
from scale.errors import ClusterError, ScaleError
from service.runtime.source_builds import Reducing, SourceFault, of_document

# What a line tells.
RECORDS, SHARE, FAULT, CLUSTER, LOG, DONE = "records", "share", "fault", "cluster", "log", "done"
_GRACE_SECONDS = 5.0


def main() -> None:
    """Build what standard input says."""
    # What libraries print goes elsewhere.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def tell(**members: Any) -> None:
        with suppress(OSError):
            lines.write(json.dumps(members) + "\n")

    document = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    with os.fdopen(int(sys.argv[1]), "wb") as out:
        try:
            _build(document, out, tell)
        except SourceFault as fault:
            tell(fault=fault.args)
        except (InvalidValue, LimitExceeded) as error:
            tell(fault=SourceFault.of(error).args)
        except ClusterError as error:
            tell(cluster=error.why, log=str(error))
        except ScaleError as error:
            tell(cluster="its workers could not do it", log=str(error))


def _build(document: dict[str, Any], out: Any, tell: Callable[..., None]) -> None:
    from engine.footprint import stored  # noqa: PLC0415 - the Arrow library is 33 MB
    from scale.cluster import cluster  # noqa: PLC0415

    wanted, allowed = of_document(document)
    sources = allowed.found(wanted)
    job = building.Job(Reducing(wanted, allowed), wanted.level, wanted.by, "", in_pieces=False)

    def told(now: building.Progress) -> None:
        tell(records=now.records, share=now.size_done / now.size if now.size else 1.0)

    following = building.Progress(len(sources), sum(source.size for source in sources), told=told)
    with cluster(document["cluster"]) as ray:
        from scale import on_ray  # noqa: PLC0415 - needs Ray

        try:
            found = on_ray.built(ray, job, sources, following)
        except ray.exceptions.RayError as error:
            why = str(error).strip().partition("\n")[0]
            raise ClusterError(document["cluster"], "it was lost", f": {why}") from None
        stored.write(found, out)
    out.flush()
    tell(done=True)


def _end_with_input() -> None:
    """Whoever wanted it has gone, or wants it no more: the tasks of the cluster are cancelled, and that is all."""
    while sys.stdin.read(1 << 16):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
