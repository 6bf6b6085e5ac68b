"""The durable form of a machine: a small head as JSON, and blocks of 4 KiB, of which a commit writes what changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.cpu import frames
from engine.errors import InvalidValue
from engine.kvm.protection_head import protection_from_head, protection_to_head
from engine.kvm.slot_files import OpenFile, SlotFile
from engine.kvm.slot_map import SlotMap
from engine.kvm.slots import SlotSpec
from engine.machine import creation, vcpu_records
from engine.machine.nested_states import states_from_head, states_to_head
from engine.machine.state import MachineState, State, targets_of_all
from engine.machine.summary import summary_to_head
from engine.state.config import VmConfig
from engine.state.frame_store import Snapshot, blocks_of
from engine.state.head import config_from_head, config_head_today, config_text, config_to_head, kept_text

# Format 1 had a record for each vCPU that a machine has room for; otherwise the two are alike.
HEAD_FORMAT = 2
_READ = (1, HEAD_FORMAT)

# Opens the file behind a slot, or says that it is not there.
Attach = Callable[[SlotFile], OpenFile | None]


def head_of(state: State) -> dict[str, Any]:
    """The small part, as JSON: configuration, slots, protections, number of frames."""
    return {
        **_head_of_others(state),
        "config": config_to_head(state.config),
        "slots": json.loads(state.slots.json),
        "protections": [protection_to_head(p) for p in state.protections.values()],
    }


def head_text(state: State) -> str:
    """The head as text. A machine may have thousands of slots, vCPUs and protected objects: their text is kept, not
    made again."""
    protections = ", ".join(kept_text(protection, protection_to_head) for protection in state.protections.values())
    others = json.dumps(_head_of_others(state))[1:]
    config = config_text(state.config)
    return f'{{"slots": {state.slots.json}, "config": {config}, "protections": [{protections}], {others}'


def _head_of_others(state: State) -> dict[str, Any]:
    """The head without the slots, the configuration and the protections."""
    return {
        "format": HEAD_FORMAT,
        "nested": states_to_head(state.config, state.nested),
        "frames": len(state.snapshot.machine.row_of),
        "outline": summary_to_head(spp_active=state.spp_active, failing=state.failing),
    }


def blocks_between(snapshot: Snapshot, earlier: Snapshot | None) -> Iterator[tuple[str, int, bytes]]:
    """(array, block, 4096 bytes) for what differs from an earlier state, or everything.

    The array is the frame's kind and the block its number: a block's number alone tells which one it replaces,
    and a freed frame comes as array ``free``.
    """
    since = earlier.machine if earlier is not None else None
    for frame, kind, data in blocks_of(snapshot.machine, since):
        yield frames.KIND_NAMES[kind], frame, data


def head_today(head: Mapping[str, Any]) -> dict[str, Any]:
    """A head that ``restored`` takes, as this release would have written it, however early it was written."""
    return {**head, "format": HEAD_FORMAT, "config": config_head_today(head["config"])}


def restored(head: Mapping[str, Any], blocks: Mapping[tuple[str, int], bytes], attach: Attach) -> MachineState:
    """The state that ``head`` and all its blocks describe; ``blocks`` maps (array, block) to 4096 bytes, ``attach``
    opens the files behind slots.

    Raises InvalidValue for a format of later releases, and where the blocks are not those of such a machine.
    """
    if type(head["format"]) is not int or head["format"] not in _READ:
        raise InvalidValue(f"this release reads formats up to {HEAD_FORMAT}", field="format", value=head["format"])
    config = config_from_head(head["config"])
    kinds = {name: kind for kind, name in enumerate(frames.KIND_NAMES)}
    used = {block: (kinds[array], data) for (array, block), data in blocks.items() if array != "free"}
    places = _places(config, {block: kind for block, (kind, _) in used.items()}, head["frames"])
    store = creation.new_store(config, places.start - int(frames.FIRST_VCPU_FRAME))
    store.adopt(used, head["frames"], places)
    known = {item.name: item for item in map(protection_from_head, head["protections"])}
    state = MachineState(
        store,
        State(
            config,
            store.published,
            SlotMap.of(_slot(row, attach) for row in head["slots"]),
            known,
            targets_of_all(known),
            states_from_head(config, head.get("nested", {})),
        ),
    )
    state.choose_path()
    return state


def _slot(row: Sequence[Any], attach: Attach) -> SlotSpec:
    spec = SlotSpec.of_row(row)
    return spec if spec.backing is None else replace(spec, backing=replace(spec.backing, opened=attach(spec.backing)))


def _places(config: VmConfig, kinds: Mapping[int, int], total: int) -> range:
    """Frames that are kept for vCPUs that may come, behind the records of those that are; kernels go to both without
    looking. ``kinds`` are those of the frames in use, of ``total`` in all."""
    first = int(frames.FIRST_VCPU_FRAME)
    found = sorted(frame for frame, kind in kinds.items() if kind == frames.VCPU)
    if len(found) < (least := vcpu_records.wanted(config)):
        raise InvalidValue(f"this machine has {least} records of vCPUs or more", field="blocks", value=len(found))
    places = range(first + len(found), first + config.vcpu_records)
    if found[-1] != places.start - 1 or found[0] != first:
        raise InvalidValue("records of vCPUs follow frame 0 without a gap", field="blocks", value=found)
    if taken := [frame for frame in kinds if frame in places]:
        raise InvalidValue("the place of a vCPU that may come is in use", field="blocks", value=min(taken))
    if total < (least := max(places.start, places.stop)):
        raise InvalidValue(f"this machine has {least} frames or more", field="frames", value=total)
    return places
