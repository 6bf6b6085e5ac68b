"""``make guest-demo``: a real kernel boots in QEMU, its objects are protected by name, and its own script tampers with
two of them.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from capture.errors import CaptureError
from capture.guest import START, SmallGuest, small_guest
from service.cli.symbol_policies import Wanted, policy_from, read_symbols, text_of
from service.platform.failures import Failure

PROTECTED = ("sys_call_table", "modprobe_path", "core_pattern", "poweroff_cmd", "init_cred", "security_hook_heads")
TAMPERED = ("modprobe_path", "core_pattern")


def main(folder: Path) -> int:
    """0 when the report names both objects and who wrote to them."""
    try:
        guest = small_guest(folder)
        policy = policy_of(guest, folder / "policy.json")
    except (CaptureError, Failure) as error:
        sys.stderr.write(f"guest-demo: {error}\n")
        return 1
    command = [sys.executable, "-P", "-m", "service.cli", "live", "--policy", str(policy)]
    command += ["--symbols", str(guest.symbols), "--start", START, "--", *guest.command()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    sys.stdout.write(done.stdout)
    missing = [name for name in TAMPERED if f"  {name}: " not in done.stdout]
    if missing:
        sys.stderr.write(f"guest-demo: nobody was seen to write to {', '.join(missing)}\n")
    return done.returncode or bool(missing)


def policy_of(guest: SmallGuest, path: Path) -> Path:
    """The policy of the demonstration, at the places that this guest's kernel has them. Raises Failure."""
    symbols = read_symbols(guest.symbols)
    known = [Wanted(name) for name in PROTECTED if symbols.table.find(name)]
    path.write_text(text_of(policy_from(symbols, known, "kernel-objects")), encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build/guest")))
