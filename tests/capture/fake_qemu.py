"""A program that stands in for QEMU: it loads the plugin, answers on the control socket, and makes the accesses that
the file FAKE_GUEST (JSON) says: ``{"accesses": [[vcpu, info, gva, pc], …], "run": [vcpus, count], …}``.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

TREE = """FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): pc.ram
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000cafff (prio 0, rom): pc.ram @00000000000c0000
  0000000000100000-{last:016x} (prio 0, ram): pc.ram @0000000000100000
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram
"""


class Info(ctypes.Structure):
    """qemu_info_t."""

    _fields_ = (
        ("target_name", ctypes.c_char_p),
        ("oldest", ctypes.c_int),
        ("newest", ctypes.c_int),
        ("system_emulation", ctypes.c_bool),
        ("smp_vcpus", ctypes.c_int),
        ("max_vcpus", ctypes.c_int),
    )


def main(guest: dict[str, Any], arguments: list[str]) -> int:
    if arguments == ["--version"]:
        sys.stdout.write(guest.get("version", "QEMU emulator version 10.0.2 (Debian)\n"))
        return 0
    if arguments == ["-help"]:
        sys.stdout.write("-accel [accel=]\n" + ("" if guest.get("pluginless") else "-plugin [file=]<file>\n"))
        return 0
    if "status" in guest:
        sys.stderr.write("qemu: that is no machine\n")
        return int(guest["status"])
    vcpus = guest.get("run", [1])[0]
    fake = ctypes.CDLL(guest["library"], mode=ctypes.RTLD_GLOBAL)
    path, *words = arguments[arguments.index("-plugin") + 1].split(",")
    plugin = ctypes.CDLL(path)
    texts = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
    info = Info(guest.get("target", "x86_64").encode(), 0, 4, True, vcpus, vcpus)
    if plugin.qemu_plugin_install(ctypes.c_uint64(1), ctypes.byref(info), len(words), texts):
        sys.stderr.write("qemu: could not load the plugin\n")
        return 1
    fd = re.search(r"fd=(\d+)", arguments[arguments.index("-chardev") + 1])
    assert fd is not None
    control = socket.socket(fileno=int(fd[1]))
    answer(control, guest, vcpus)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    for vcpu, what, gva, pc in guest.get("accesses", []):
        fake.fake_access(vcpu, what, ctypes.c_uint64(gva), ctypes.c_uint64(pc))
    if "run" in guest:
        fake.fake_run(vcpus, ctypes.c_uint64(guest["run"][1]))
    if "event" in guest:
        control.sendall(json.dumps(guest["event"]).encode() + b"\n")
    time.sleep(guest.get("sleep", 0))
    if "signal" in guest:
        os.kill(os.getpid(), guest["signal"])
    fake.fake_end()
    return 0


def answer(control: socket.socket, guest: dict[str, Any], vcpus: int) -> None:
    """Serve the control socket until the guest is to run."""
    ram = guest.get("ram", 1 << 30)
    answers = {
        "qmp_capabilities": {},
        "query-memory-size-summary": {"base-memory": ram},
        "query-cpus-fast": [{}] * vcpus,
        "query-memdev": guest.get("memdev", []),
        "query-kvm": {"enabled": guest.get("kvm", False), "present": True},
        "human-monitor-command": TREE.format(last=ram - 1) + guest.get("more_ram", ""),
        "cont": {},
    }
    file = control.makefile("rwb")
    file.write(b'{"QMP": {"version": {}, "capabilities": []}}\n')
    file.flush()
    for line in file:
        asked = json.loads(line)
        name = asked["execute"]
        reply = {"return": answers[name]} if name != "qom-get" else property_of(guest, **asked["arguments"])
        file.write(json.dumps(reply).encode() + b"\n")
        file.flush()
        if name == "cont":
            return


def property_of(guest: dict[str, Any], path: str, property: str) -> dict[str, Any]:
    """Of an object of the machine: what the test says of it by its name."""
    found = guest.get("objects", {}).get(path.removeprefix("/objects/"), {})
    if property not in found:
        return {"error": {"class": "GenericError", "desc": f"Property '{property}' not found"}}
    return {"return": found[property]}


if __name__ == "__main__":
    status = main(json.loads(Path(os.environ["FAKE_GUEST"]).read_text(encoding="utf-8")), sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # an interpreter that ends by itself heeds SIGTERM for a while, which QEMU has done with by then
