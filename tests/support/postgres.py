"""A PostgreSQL server for the time of a test, as an unprivileged user, in a folder that goes with it."""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

MISSING = "PostgreSQL is not installed (Debian: apt-get install postgresql)"


def binaries() -> Path | None:
    """Where the server's programs are: Debian keeps them out of PATH, one folder for each version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    elsewhere = shutil.which("initdb")
    return Path(elsewhere).parent if elsewhere else None


def _user() -> str:
    """initdb and the server refuse to run as root."""
    if os.geteuid() != 0:
        return getpass.getuser()
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


class Cluster:
    """One running server with one database."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self._user = _user()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"postgresql://subpage@127.0.0.1:{self.port}/subpage"

    def create(self) -> None:
        if os.geteuid() == 0:
            shutil.chown(self._folder, self._user)
        self._run("initdb", "--auth=trust", "--username=subpage", "--encoding=UTF8", "--no-sync", "--no-locale")
        self.start()
        self.sql("CREATE DATABASE subpage", database="postgres")

    def start(self) -> None:
        options = f"-c port={self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c max_connections=50"
        log = str(self._folder / "log")
        self._run("pg_ctl", "start", "--wait", "--timeout", "240", "--silent", "--log", log, "--options", options)

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "stop", "--wait", "--silent", "--mode", mode)

    def restart(self) -> None:
        """As an operator or a crash would: connections are cut, transactions under way are lost."""
        self.stop("immediate")
        self.start()

    def sql(self, statement: str, database: str = "subpage") -> str:
        """One statement; what it prints."""
        target = f"host=127.0.0.1 port={self.port} user=subpage dbname={database}"
        return self._command([str(self._programs / "psql"), "-qAtX", "-d", target, "-c", statement])

    def _run(self, program: str, *arguments: str) -> str:
        data = ["-D", str(self._folder / "data")]
        return self._command([str(self._programs / program), *data, *arguments])

    def _command(self, command: Sequence[str]) -> str:
        other = {"user": self._user} if os.geteuid() == 0 else {}
        # The server inherits what it is started with: a pipe would never end.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                command, cwd=self._folder, stdout=output, stderr=output, stdin=subprocess.DEVNULL, check=False, **other
            )
            output.seek(0)
            text = output.read().decode()
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {text}")
        return text


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A server; RuntimeError with a reason where PostgreSQL is not installed."""
    programs = binaries()
    if programs is None:
        raise RuntimeError(MISSING)
    folder = Path(tempfile.mkdtemp(prefix="subpage-postgres-"))
    server = Cluster(programs, folder)
    try:
        server.create()
        yield server
    finally:
        with contextlib.suppress(RuntimeError):
            server.stop("immediate")
        shutil.rmtree(folder, ignore_errors=True)
