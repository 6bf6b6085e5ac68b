"""Cost a policy: which of a guest's writes would exit, and how many whole-page protection would have cost.

Start the service (`make serve`), then: `.venv/bin/python examples/cost_a_policy.py [URL]`
"""

import json
import sys
from pathlib import Path

import httpx2

DATA = Path(__file__).parent.parent / "service" / "data"


def main(url: str) -> None:
    policy = json.loads((DATA / "policies" / "kernel_control_data.json").read_text(encoding="utf-8"))
    with httpx2.Client(base_url=url, timeout=120) as client:
        slot = {"slot": 0, "gpa": "0x0", "size": "0x40000000"}
        vm = client.post("/v1/vms", json={"memory_slots": [slot], "spp": True}).raise_for_status().json()["id"]
        client.post(f"/v1/vms/{vm}/protections", json=policy).raise_for_status()
        reply = client.post(
            f"/v1/vms/{vm}/traces",
            content=(DATA / "traces" / "boot.parquet").read_bytes(),
            headers={"Content-Type": "application/vnd.apache.parquet"},
        )
        result = reply.raise_for_status().json()
        client.delete(f"/v1/vms/{vm}")
    for name, hits in result["by_object"].items():
        print(f"{name:24} {hits['violations']:6} violations, {hits['collateral']} of them collateral")
    print(f"{result['violations']} exits with sub-pages, {result['page_granular_violations']} with whole pages")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
