"""Device virtualization: a ring shared with a device, whose doorbell traps while its descriptors stay writable.

The page is a real one: a buffer that the recorded guest fills round and round with nearly two million writes. Its
first 128 bytes, which it writes least, play the doorbell. Whole-page protection would trap every descriptor as well.

Run: `.venv/bin/python examples/device.py [URL]`; without a URL it starts a service of its own.
"""

import sys

from connect import USER, connect, guest

RING = 0x29B7
DOORBELL = RING << 12
ALL_BUT_THE_FIRST = "0xfffffffe"

# Writes of the user trace to the ring, and those of them that ring the doorbell.
WRITES = 1898919
RINGS = 7776


def main(url: str | None) -> None:
    with connect(url) as client, guest(client, profile="kvm-latest") as vm:
        vm.set_page_access([{"gfn": hex(RING), "write_bitmap": ALL_BUT_THE_FIRST}])

        # One by one, as a device model sees it: the descriptor lands, the doorbell exits and tells its address.
        descriptor = bytes.fromhex("0011223344556677")
        assert vm.access(DOORBELL + 128, data=descriptor)["allowed"]
        ring = vm.access(DOORBELL, data=descriptor)
        print(f"doorbell: {ring['run']['name']} at {ring['run']['spp']['addr']}")
        assert not ring["allowed"] and ring["run"]["name"] == "KVM_EXIT_SPP"
        assert int(ring["run"]["spp"]["addr"], 16) == DOORBELL
        assert vm.read_memory(DOORBELL, 256) == bytes(128) + descriptor + bytes(120)

        # And the whole run: the device serves each ring, the guest goes on.
        trace = vm.replay(USER, on_violation="allow")
        exits = list(trace.exits())
    trapped, whole = trace.violations, trace.page_granular_violations
    print(f"{whole} writes to the ring, {trapped} exits for the doorbell: {whole / trapped:.0f} times fewer")
    assert (trapped, whole) == (RINGS, WRITES)
    assert len(exits) == RINGS and {int(item["gpa"], 16) >> 7 for item in exits} == {DOORBELL >> 7}


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
