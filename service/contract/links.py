"""Links of the contract: which calls take what another one answered. They need no prose to be followed by tools."""

from __future__ import annotations

import re
from typing import Any

_PARAMETER = re.compile(r"{([^}]+)}")

# For the operation that makes something: where its answer has what stands in the paths of calls about it.
_MADE: dict[str, dict[str, str]] = {
    "createVm": {"vm": "$response.body#/id", "n": "$response.body#/vcpus/0/id"},
    "createProtection": {"vm": "$request.path.vm", "name": "$response.body#/name"},
    "createTrace": {"vm": "$request.path.vm", "trace": "$response.body#/id"},
    "harvestDirty": {"vm": "$request.path.vm", "harvest": "$response.body#/harvest"},
}
# What only such an answer tells: a call that needs it is linked from there and not from the VM.
_PLACE_OF_ITS_OWN = {
    "getProtection": "createProtection",
    "deleteProtection": "createProtection",
    "getTrace": "createTrace",
    "getExits": "createTrace",
    "getHarvest": "harvestDirty",
}


def add_links(document: dict[str, Any]) -> None:
    """Add ``links`` to the successes of the operations that make something."""
    operations = {
        operation["operationId"]: (path, operation)
        for path, item in document["paths"].items()
        for operation in item.values()
    }
    for made_by, told in _MADE.items():
        links = {}
        for target, (path, _) in operations.items():
            needed = _PARAMETER.findall(path)
            if "vm" in needed and _PLACE_OF_ITS_OWN.get(target, "createVm") == made_by:
                links[target] = {
                    "operationId": target,
                    "parameters": {name: told[name] for name in needed if name in told},
                }
        replies = operations[made_by][1]["responses"]
        for status, reply in replies.items():
            if status in ("200", "201"):
                reply["links"] = links
