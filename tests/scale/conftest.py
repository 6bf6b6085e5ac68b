"""Two nodes of a cluster on one machine, and a store of objects."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from service.cli.app import app
from tests.scale.nodes import begun


@pytest.fixture(scope="session")
def cluster(store: object) -> Iterator[Any]:
    """``cluster_utils.Cluster`` with a head, which is given no work, and a node of one processor. What they know of the
    store is in the environment that they begin with."""
    from ray.cluster_utils import Cluster

    # Workers are not to be last in line on a machine that is busy with other tests.
    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    # A node that is gone is noticed in seconds: by default it may be silent for half a minute.
    quick = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False, "_system_config": quick}
    made = begun(lambda: Cluster(initialize_head=True, head_node_args=head))
    begun(lambda: made.add_node(num_cpus=1, object_store_memory=100 << 20))
    yield made
    made.shutdown()


@pytest.fixture(scope="session")
def store() -> Iterator[Callable[[str, bytes], None]]:
    """A store of objects that speaks S3, which the environment names; the function puts an object into its bucket
    ``traces``."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    try:
        _answers(port)
        from pyarrow import fs

        files = fs.S3FileSystem(
            allow_bucket_creation=True, endpoint_override=f"127.0.0.1:{port}", scheme="http", region="us-east-1"
        )
        files.create_dir("traces")

        def put(key: str, content: bytes) -> None:
            with files.open_output_stream(f"traces/{key}") as out:
                out.write(content)

        yield put
    finally:
        server.terminate()
        server.wait()


def _answers(port: int) -> None:
    for _ in range(600):
        with socket.socket() as there:
            if there.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the store of objects does not begin")


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    """Runs ``subpage``; ``status`` is what it must exit with."""

    def subpage(*arguments: object, status: int = 0) -> Result:
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == status, (done.output, done.exception)
        return done

    return subpage
