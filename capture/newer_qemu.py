"""``python -m capture.newer_qemu FOLDER``: QEMU 10 of Debian's backports, unpacked beside the one that is installed.

Nothing is installed: apt is asked with lists of its own, and what it downloads is unpacked into the folder, where
``qemu-system-x86_64`` starts it. What it links with, an installed QEMU of Debian 12 has brought already.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from capture.errors import CaptureError
from capture.guest import run

_SOURCE = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} bookworm-backports main\n"
_MIRROR = "http://deb.debian.org/debian"  # what Debian's own images ask
_PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
_SCRIPT = """#!/bin/sh
exec '{root}/usr/bin/qemu-system-x86_64' -L '{root}/usr/share/seabios' -L '{root}/usr/share/qemu' "$@"
"""


def newer_qemu(folder: Path) -> Path:
    """The program, fetched unless ``folder`` has it. Raises CaptureError."""
    program = folder / "qemu-system-x86_64"
    if program.exists():
        return program
    shutil.rmtree(folder, ignore_errors=True)
    lists, root = folder / "lists", folder / "root"
    (lists / "partial").mkdir(parents=True)
    root.mkdir()
    source = folder / "sources.list"
    source.write_text(_SOURCE.format(mirror=_MIRROR), encoding="utf-8")
    options = [f"Dir::Etc::sourcelist={source}", "Dir::Etc::sourceparts=/dev/null", f"Dir::State::lists={lists}"]
    apart = [word for option in (*options, f"Dir::Cache={folder}") for word in ("-o", option)]
    run(["apt-get", *apart, "update"])
    run(["apt-get", *apart, "download", *_PACKAGES], folder)
    for archive in sorted(folder.glob("*.deb")):
        run(["dpkg-deb", "-x", str(archive), str(root)])
        archive.unlink()
    shutil.rmtree(lists)
    script = folder / "script"
    script.write_text(_SCRIPT.format(root=root.absolute()), encoding="utf-8")
    script.chmod(0o755)
    said = run([str(script), "--version"]).stdout
    if not re.search(r"QEMU emulator version 1\d\.", said):
        raise CaptureError(f"what backports have is no QEMU 10: {said.strip()}")
    return script.replace(program)


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{newer_qemu(Path(sys.argv[1]).absolute())}\n")
    except CaptureError as error:
        sys.exit(f"newer QEMU: {error}")
