"""Cost a policy: which of a guest's writes would exit, and how many whole-page protection would have cost.

Start the service (`make serve`), then: `.venv/bin/python examples/cost_a_policy.py [URL]`
"""

import sys
from pathlib import Path

import subpage

DATA = Path(__file__).parent.parent / "service" / "data"


def main(url: str) -> None:
    with subpage.Client(url) as client:
        vm = client.create_vm("guest", memory="1GiB")
        vm.protect(DATA / "policies" / "kernel_control_data.json")
        trace = vm.replay(DATA / "traces" / "boot.parquet", progress=True)
        vm.delete()
    for name, hits in trace.by_object.items():
        print(f"{name:24} {hits['violations']:6} violations, {hits['collateral']} of them collateral")
    print(f"{trace.violations} exits with sub-pages, {trace.page_granular_violations} with whole pages")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
