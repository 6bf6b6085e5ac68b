"""What stands for each path parameter but the machine's, where tests go through every route of the contract."""

from __future__ import annotations

import re
from typing import Any

# A new name gets a line here.
PLACES = {
    "n": "0",
    "slot": "0",
    "level": "1",
    "gpa": "0x0",
    "trace": "tr_0",
    "job": "job_0",
    "name": "paths",
    "code": "vm-busy",
    "cap": "163",
}
# Where the same word names something else: the first that the path ends with.
BY_PATH = {"/vcpus/{n}/ioctls/{name}": "KVM_GET_CPUID2", "/ioctls/{name}": "KVM_CHECK_EXTENSION"}


def url(path: str, operation: dict[str, Any], vm: str) -> str:
    """The path of an operation with all of its places taken, and the parameters that it cannot do without."""
    asked = "&".join(
        f"{parameter['name']}={parameter['schema'].get('examples', ['0x0'])[0]}"
        for parameter in operation.get("parameters", [])
        if parameter["in"] == "query" and parameter["required"]
    )
    vm = vm.rpartition("/")[2]
    path = next((path.replace("{name}", name) for end, name in BY_PATH.items() if path.endswith(end)), path)
    return re.sub(r"{(\w+)}", lambda name: PLACES.get(name[1], vm if name[1] == "vm" else "0"), path) + f"?{asked}"
