"""Walks, questions and processors in the browser."""

from __future__ import annotations

import threading

import pytest
from playwright.sync_api import expect

from tests.console.chromium import Visit
from tests.support.http import access, map_of, new_vm, set_map
from tests.support.server import Running
from tests.support.waiting import until

pytestmark = pytest.mark.console


def test_a_walk_says_what_decides(visit: Visit, service: Running) -> None:
    vm = new_vm(service.client)
    set_map(service.client, vm, 0x10, 0xFFFF_FFFE)
    page = visit.open(f"/vms/{vm.split('/')[-1]}/walk")
    page.get_by_label("Guest-physical address").fill("0x10040")
    page.get_by_role("button", name="Walk", exact=True).click()
    expect(page.get_by_text("the access is refused")).to_be_visible()
    page.get_by_role("button", name="After KVM has handled it").click()
    expect(page.get_by_role("article", name="SPPL1E")).to_contain_text("decides")
    page.mouse.move(0, 0)  # what lies under it would be told instead
    page.get_by_role("article", name="PTE", exact=True).get_by_role("button", name="SPP 61").focus()
    expect(page.get_by_text("SPP, bit 61: Sub-page write permissions")).to_be_visible()


def test_an_entry_is_stored_and_taken_back(visit: Visit, service: Running) -> None:
    vm = new_vm(service.client)
    access(service.client, vm, gpa="0x10000", size=8)
    before = service.client.get(f"{vm}/ept/1/0x10000").json()["raw"]
    page = visit.open(f"/vms/{vm.split('/')[-1]}/walk?gpa=0x10000")
    page.get_by_role("article", name="PTE", exact=True).get_by_role("button", name="Edit").click()
    page.get_by_label("The 64 bits").fill("0x7")
    page.get_by_role("button", name="Store").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert service.client.get(f"{vm}/ept/1/0x10000").json()["raw"] == "0x7"
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_role("button", name="Undo")).to_be_hidden()
    assert service.client.get(f"{vm}/ept/1/0x10000").json()["raw"] == before


def test_the_page_is_the_introspection_tool(visit: Visit, service: Running) -> None:
    vm = new_vm(service.client)
    set_map(service.client, vm, 0x10, 0xFFFF_FFFE)
    page = visit.open(f"/vms/{vm.split('/')[-1]}/live")
    page.get_by_role("button", name="Attach").click()
    expect(page.get_by_text("attached, 1 tool")).to_be_visible()
    landed: list[bool] = []

    def write() -> None:
        landed.append(access(service.client, vm, gpa="0x10040", size=8, on_violation="ask")["landed"])

    for answer, outcome in (("Skip", False), ("Allow once", True)):
        writing = threading.Thread(target=write)
        writing.start()
        expect(page.get_by_role("article", name="Question")).to_contain_text("0x10040")
        page.get_by_role("button", name=answer, exact=True).click()
        expect(page.get_by_role("article", name="Question")).to_have_count(0)
        writing.join(10)
        assert landed[-1] is outcome
    # Granted and remembered: closed again, the same sub-page is granted without a question.
    writing = threading.Thread(target=write)
    writing.start()
    page.get_by_role("button", name="Grant and remember").click()
    writing.join(10)
    expect(page.get_by_text("granted: 0x10 sub-page 0")).to_be_visible()
    set_map(service.client, vm, 0x10, 0xFFFF_FFFE)
    writing = threading.Thread(target=write)
    writing.start()
    until(lambda: len(landed) == 4)
    writing.join(10)
    assert landed == [False, True, True, True] and map_of(service.client, vm, 0x10) == 0xFFFF_FFFF
    # All of it is in the list of events, which goes on while one looks.
    expect(page.get_by_role("log").get_by_text("at 0x10040 refused").first).to_be_visible()


def test_processors(visit: Visit, service: Running) -> None:
    vm = new_vm(service.client, vcpus=2, translation_cache="model")
    access(service.client, vm, gpa="0x10000", size=8, vcpu=1)
    page = visit.open(f"/vms/{vm.split('/')[-1]}/processor")
    expect(page.get_by_text("Nothing is cached.")).to_be_visible()
    page.get_by_label("Processor", exact=True).select_option("1")
    expect(page.get_by_role("heading", name="Translation cache · 1 entry")).to_be_visible()
    expect(page.get_by_text("Accepted: vmxon_pa is -1: done.")).to_be_visible()


def test_the_operator_sees_jobs_and_metrics(visit: Visit, service: Running) -> None:
    vm = new_vm(service.client)
    headers = {"Content-Type": "application/x-ndjson", "Prefer": "respond-async"}
    job = service.client.post(f"{vm}/traces", content=b'{"gpa": 4096}\n', headers=headers).json()
    page = visit.open("/operator")
    expect(page.get_by_role("row", name=job["id"])).to_contain_text("succeeded")
    tile = page.locator(".tile").filter(has=page.get_by_text("Machines", exact=True))
    expect(tile).to_contain_text(str(len(service.client.get("/v1/vms", params={"limit": 1000}).json()["vms"])))
