"""What the document says more than once, said once: under ``components``, with references from where it stood.

The routes say in full what they take and answer; ``share`` works on the finished document. Names are made of what they
name, so that they stay when routes come and go: a refusal is called after its problems, a parameter after itself, and
two parameters of one name after the things that they are (``PARAMETERS``).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from service.http.wire_types import Word
from service.problems import MEDIA_TYPE

Part = dict[str, Any]

# Parameters of which the name alone does not tell what they are, by name and description.
PARAMETERS = {
    ("vm", "Id of the VM."): "VmId",
    ("n", "KVM vCPU id."): "VcpuId",
    ("job", "Id of the job."): "JobId",
    ("trace", "Id of the trace."): "TraceId",
    ("name", "Name of the protection."): "ProtectionName",
    ("name", "Name of the ioctl."): "IoctlName",
    ("gpa", "Guest-physical address."): "GpaInPath",
    ("slot", "Number of the slot."): "SlotNumber",
    ("level", "1 is the leaf: the PTE, or the vector of a page."): "TableLevel",
    ("cap", "Number or name, as 163, `hyperv-enlightened-vmcs` or KVM_CAP_HYPERV_ENLIGHTENED_VMCS."): "VcpuCapability",
    ("cap", "Number or name, 182 or x86-spp or KVM_CAP_X86_SPP or spp."): "VmCapability",
    ("arg", "Scalar argument of a call without a JSON body."): "IoctlArgument",
}
# Refusals that always come together, by one word.
_REPEATED = frozenset({"idempotency-in-progress", "idempotency-answer-lost", "idempotency-mismatch"})
# Widths of numbers that the document names.
_BITS = (16, 32, 48, 64)
# Members of a schema that say nothing about its shape, and stay where they are beside a reference.
_BESIDE = ("description", "default", "examples", "deprecated")


def share(document: Part) -> None:
    """Move what stands in ``document`` several times to its components."""
    words = _share_words(document)
    components = document["components"]
    components["schemas"] = dict(sorted((components["schemas"] | words).items()))
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    replies = [reply for operation in operations for reply in operation["responses"].values()]
    components["headers"] = _share([reply["headers"] for reply in replies if "headers" in reply], _header_name)
    refusals = [reply["content"][MEDIA_TYPE]["examples"] for reply in replies if _is_refusal(reply)]
    names = {id(reply): name for operation in operations for name, reply in _named_replies(operation)}
    components["examples"] = _share(refusals, lambda code, example: _camel(code), "examples")
    components["responses"] = _share(
        [operation["responses"] for operation in operations],
        lambda status, reply: names[id(reply)],
        "responses",
        always=_is_refusal,
    )
    lists = [operation["parameters"] for operation in operations if "parameters" in operation]
    rows = [dict(enumerate(parameters)) for parameters in lists]
    components["parameters"] = _share(rows, _parameter_name, "parameters")
    for parameters, row in zip(lists, rows, strict=True):
        parameters[:] = row.values()


def _share(
    holders: list[dict[Any, Part]],
    named: Callable[[Any, Part], str],
    kind: str = "headers",
    *,
    always: Callable[[Part], bool] = lambda part: False,
) -> Part:
    """Replace equal members of ``holders`` by references; what they refer to, by name."""
    seen = Counter(_text(part) for holder in holders for part in holder.values())
    shared: dict[str, Part] = {}
    for holder in holders:
        for key, part in holder.items():
            if seen[_text(part)] > 1 or always(part):
                name = named(key, part)
                if shared.setdefault(name, part) != part:
                    raise ValueError(f"two different {kind} are called {name}; tell them apart in {__name__}")
                holder[key] = {"$ref": f"#/components/{kind}/{name}"}
    return dict(sorted(shared.items()))


def _text(part: Any) -> str:
    return json.dumps(part, sort_keys=True)


def _camel(words: str) -> str:
    return "".join(word[0].upper() + word[1:] for word in re.findall(r"[A-Za-z0-9]+", words))


def _header_name(name: str, header: Part) -> str:
    return _camel(name) if header.get("required", True) else f"{_camel(name)}Sometimes"


def _parameter_name(position: int, parameter: Part) -> str:
    return PARAMETERS.get((parameter["name"], parameter["description"])) or _camel(parameter["name"])


def _is_refusal(reply: Part) -> bool:
    return MEDIA_TYPE in reply.get("content", {})


def _named_replies(operation: Part) -> Iterator[tuple[str, Part]]:
    """Each reply, and what it is called: after its problems, its model, or what it says where it has no body."""
    for reply in operation["responses"].values():
        content = reply.get("content", {})
        if MEDIA_TYPE in content:
            codes = sorted(content[MEDIA_TYPE]["examples"])
            name = "Or".join(dict.fromkeys("Repeated" if code in _REPEATED else _camel(code) for code in codes))
        elif content:
            name = next(
                (media["schema"]["$ref"].rpartition("/")[2] for media in content.values() if "$ref" in media["schema"]),
                "",
            )
        else:
            name = _camel(reply["description"]) + ("Variant" if "Vary" in reply.get("headers", {}) else "")
        yield name, reply


def _share_words(document: Part) -> Part:
    """Numbers on the wire by name: ``Word64`` and so on as taken, ``Hex64`` and so on as told."""
    shapes: dict[str, Part] = {}
    for bits in _BITS:
        word = Word(bits)
        about = f"An unsigned number of {bits} bits"
        shapes[f"Word{bits}"] = {"description": f"{about}: `0x` and hexadecimal digits, decimal digits, or an integer."}
        shapes[f"Word{bits}"] |= word.taken()
        shapes[f"Hex{bits}"] = {"description": f"{about}: `0x` and hexadecimal digits.", **word.told()}
    known = {_text(_bare(shape)): name for name, shape in shapes.items()}
    used: set[str] = set()

    def visit(part: Any) -> Any:
        if isinstance(part, list):
            return [visit(member) for member in part]
        if not isinstance(part, dict):
            return part
        name = known.get(_text(_bare(part))) if "type" in part or "anyOf" in part else None
        if name is None:
            return {key: member if key in ("example", "examples") else visit(member) for key, member in part.items()}
        used.add(name)
        beside = {key: part[key] for key in _BESIDE if key in part and part[key] != shapes[name].get(key)}
        return {"$ref": f"#/components/schemas/{name}", **beside}

    document["paths"] = visit(document["paths"])
    document["components"]["schemas"] = visit(document["components"]["schemas"])
    return {name: shapes[name] for name in sorted(used)}


def _bare(schema: Part) -> Part:
    return {key: member for key, member in schema.items() if key not in _BESIDE}
