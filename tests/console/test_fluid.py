"""A thousand machines, a hundred thousand protected pages: lists stay light. ``bench`` measures speed."""

from __future__ import annotations

import httpx2
import numpy as np
import pytest
from playwright.sync_api import expect

from tests.console.chromium import Visit
from tests.support.http import new_vm
from tests.support.server import Running

pytestmark = pytest.mark.console

OCTETS = {"Content-Type": "application/octet-stream"}


def test_a_thousand_machines(visit: Visit, service: Running) -> None:
    with httpx2.Client(base_url=service.url) as client:  # a thousand alike need not be held against the contract
        for number in range(1000):
            assert client.post("/v1/vms", json={"name": f"machine {number}"}).is_success
    page = visit.open()
    expect(page.get_by_role("heading", name="1,000 machines")).to_be_visible()
    assert page.locator(".machine-row").count() < 60
    # The last one is reached, and found by its name.
    page.locator(".virtual").evaluate("(list) => { list.scrollTop = list.scrollHeight; }")
    expect(page.get_by_text("machine 0", exact=False).first).to_be_visible()
    page.get_by_label("Filter machines").fill("machine 77")
    expect(page.get_by_role("heading", name="1,000 machines · 11 shown")).to_be_visible()


def test_a_hundred_thousand_protected_pages(visit: Visit, service: Running) -> None:
    vm = new_vm(service.client, memory_slots=[{"slot": 0, "gpa": 0, "size": 1 << 30}])
    words = np.random.default_rng(1).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    reply = service.client.put(
        f"{vm}/subpages", params={"gfn": 0, "npages": len(words)}, content=words.tobytes(), headers=OCTETS
    )
    assert reply.status_code == 204
    page = visit.open(f"/vms/{vm.split('/')[-1]}/map")
    expect(page.get_by_text("100,000 pages as a table")).to_be_visible()
    heat = page.get_by_role("application")
    heat.focus()
    page.keyboard.press("End")
    expect(page.locator("aside dd").first).to_have_text("0x1869f")
    page.keyboard.press("0")  # everything at once
