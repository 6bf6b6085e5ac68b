"""Device virtualization: a ring shared with a device, whose doorbell traps while its descriptors stay writable.

The page is a real one: a buffer that the recorded guest fills round and round with nearly two million writes. Its
first 128 bytes, which it writes least, play the doorbell. Whole-page protection would trap every descriptor as well.

Run: `.venv/bin/python examples/device.py [URL]`; without a URL it starts a service of its own.
"""

import json
import sys

from connect import PARQUET, USER, connect, guest

RING = 0x29B7
DOORBELL = RING << 12
ALL_BUT_THE_FIRST = "0xfffffffe"

# Writes of the user trace to the ring, and those of them that ring the doorbell.
WRITES = 1898919
RINGS = 7776


def main(url: str | None) -> None:
    with connect(url) as client, guest(client, profile="kvm-latest") as home:
        entry = {"gfn": hex(RING), "write_bitmap": ALL_BUT_THE_FIRST}
        client.patch(f"{home}/page-access", json={"entries": [entry]}).raise_for_status()

        # One by one, as a device model sees it: the descriptor lands, the doorbell exits and tells its address.
        descriptor = {"gpa": hex(DOORBELL + 128), "access": "write", "data": "0011223344556677", "size": 8}
        assert client.post(f"{home}/accesses", json=descriptor).raise_for_status().json()["allowed"]
        ring = client.post(f"{home}/accesses", json={**descriptor, "gpa": hex(DOORBELL)}).raise_for_status().json()
        print(f"doorbell: {ring['run']['name']} at {ring['run']['spp']['addr']}")
        assert not ring["allowed"] and ring["run"]["name"] == "KVM_EXIT_SPP"
        assert int(ring["run"]["spp"]["addr"], 16) == DOORBELL
        memory = client.get(f"{home}/memory", params={"gpa": hex(DOORBELL), "size": 256}).raise_for_status().content
        assert memory == bytes(128) + bytes.fromhex(descriptor["data"]) + bytes(120)

        # And the whole run: the device serves each ring, the guest goes on.
        reply = client.post(
            f"{home}/traces",
            params={"on_violation": "allow"},
            content=USER.read_bytes(),
            headers={"Content-Type": PARQUET},
        ).raise_for_status()
        result = reply.json()
        listed = client.get(f"{reply.headers['Location']}/exits", headers={"Accept": "application/x-ndjson"})
        exits = [json.loads(line) for line in listed.raise_for_status().text.splitlines()]
    trapped, whole = result["violations"], result["page_granular_violations"]
    print(f"{whole} writes to the ring, {trapped} exits for the doorbell: {whole / trapped:.0f} times fewer")
    assert (trapped, whole) == (RINGS, WRITES)
    assert len(exits) == RINGS and {int(item["gpa"], 16) >> 7 for item in exits} == {DOORBELL >> 7}


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
