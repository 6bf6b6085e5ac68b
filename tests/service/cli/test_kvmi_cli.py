"""``subpage kvmi``: a machine of a running service, and a tool that listens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from service.cli.app import app
from service.settings import Settings
from tests.kvmi.kvmi_tool import listening
from tests.support.http import new_vm
from tests.support.server import running
from tests.support.waiting import until


def run(*arguments: str, status: int = 0) -> Any:
    result = CliRunner().invoke(app, ["kvmi", *arguments])
    assert result.exit_code == status, result.output
    return result


def test_connect_show_and_disconnect(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with running(Settings(warm_up=False, kvmi_sockets=(f"unix:{tmp_path}",))) as service:
        vm = new_vm(service.client, name="mine").rpartition("/")[2]
        here = ("--url", service.url)
        told = run("connect", vm, str(tmp_path / "tool"), *here).output
        assert f"{vm}: connecting to unix:{tmp_path}/tool as mine" in told
        until(lambda: "last: [Errno 2]" in run("show", vm, *here).output)
        with listening(tmp_path / "tool") as listener, listener.accept() as guest:
            guest.done("GET_VERSION")
            until(lambda: json.loads(run("show", vm, "--json", *here).output)["state"] == "connected")
            assert "no violation can come: the tool has enabled PF on no vCPU" in run("show", vm, *here).output
            assert run("disconnect", vm, *here).output == f"{vm}: detached\n"
        assert "404" in run("show", vm, *here, status=6).output
        refused = run("connect", vm, "/etc/tool", *here, status=1).output
        assert "SUBPAGE_KVMI_SOCKETS" in refused
