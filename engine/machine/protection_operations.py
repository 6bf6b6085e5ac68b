"""Protections of a machine: named byte ranges, and pages without a name, that the guest must not write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from engine.errors import Conflict, NotFound
from engine.kvm import enabling_checks, protections, spp_set
from engine.kvm.protections import ProtectedPages, Protection
from engine.kvm.slots import check_pages
from engine.machine import virtual_objects
from engine.machine.state import Operations, State
from engine.machine.virtual_objects import Given, Moved, as_given, regroup
from engine.state.retry import new_trail, run_all


class Protections(Operations):
    """The protections of one machine."""

    def all(self) -> tuple[Protection, ...]:
        """Protections in order of creation."""
        return tuple(self._state.current.protections.values())

    def find(self, name: str) -> Protection:
        """One protection. Raises NotFound."""
        known = self._state.current.protections
        if name not in known:
            raise NotFound("must be the name of a protection of this machine", field="name", value=name)
        return known[name]

    def add(
        self, name: str, objects: Sequence[Given], ranges: Sequence[ProtectedPages], about: str | None
    ) -> Protection:
        """Protect named objects, and pages without a name. Raises Conflict when the name is taken.

        Without sub-page protection only whole pages can be protected: NotEnabled for anything else.
        """
        now = self._state.current
        pieces, owners = virtual_objects.resolve(now.snapshot.machine, now.config, objects)
        protection = Protection(name, tuple(pieces), tuple(ranges), about)
        protections.validate(protection, now.config.maxphyaddr, owners)
        self._check_active(protection)
        if name in now.protections:
            raise Conflict(
                "must be a new name: a protection of that name exists", field="name", value=name, errno="EEXIST"
            )
        _check_slots(now, protection, owners)
        self._recover(now, [protection], {**now.protections, name: protection})
        return protection

    def retranslate(self, name: str) -> tuple[Protection, list[Moved]]:
        """Walk again what a protection has by linear address, and move what it covers. Raises NotFound.

        Raises what ``add`` does for an object that does not translate any more; then nothing moves.
        """
        now = self._state.current
        before = self.find(name)
        given = [as_given(pieces) for pieces in regroup(before.objects)]
        pieces, owners = virtual_objects.resolve(now.snapshot.machine, now.config, given)
        moved = list(virtual_objects.moves(before.objects, pieces))
        if not moved:
            return before, moved
        after = replace(before, objects=tuple(pieces))
        protections.validate(after, now.config.maxphyaddr, owners)
        self._check_active(after)
        _check_slots(now, after, owners)
        self._recover(now, [before, after], {**now.protections, name: after})
        return after, moved

    def remove(self, name: str) -> None:
        """Delete a protection; what other protections cover stays covered. Raises NotFound."""
        now = self._state.current
        gone = self.find(name)
        self._recover(now, [gone], {k: v for k, v in now.protections.items() if k != name})

    def _check_active(self, protection: Protection) -> None:
        part = protection.first_in_part
        if part is not None and not self._state.current.spp_active:
            raise enabling_checks.not_enabled(f"{part} protects pages in part, and only whole pages do without")

    def _recover(self, since: State, changed: Sequence[Protection], left: Mapping[str, Protection]) -> None:
        """Store what ``left`` covers on the pages of protections that came or went."""
        gfns, _ = protections.page_masks(
            [item for p in changed for item in p.objects], [item for p in changed for item in p.ranges]
        )
        objects = [item for p in left.values() for item in p.objects]
        masks = protections.masks_at(gfns, objects, [item for p in left.values() for item in p.ranges])
        trail = new_trail()
        with self._state.change(since=since) as change:
            change.protections = left
            run_all(change, len(gfns), lambda start: spp_set.cover(change.machine, gfns, masks, start, trail))


def _check_slots(now: State, protection: Protection, owners: Sequence[int]) -> None:
    """Refuse what lies where no slot is; ``owners`` as for ``protections.validate``."""
    machine, width = now.snapshot.machine, now.config.maxphyaddr
    for position, item in zip(owners, protection.objects, strict=True):
        check_pages(machine, width, item.first_gfn, item.pages, f"objects[{position}].gpa", item.gpa)
    for position, pages in enumerate(protection.ranges):
        check_pages(machine, width, pages.gfn, pages.npages, f"pages[{position}][0]", pages.gfn)
