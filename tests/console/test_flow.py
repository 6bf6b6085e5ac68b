"""The main job in the browser, by keyboard alone: make a machine, drop a trace, deny a sub-page, replay, compare."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.console.chromium import Visit, lines
from tests.support.http import map_of, new_vm
from tests.support.server import Running

pytestmark = pytest.mark.console

WRITES = [{"gpa": hex(0x10000 + 128 * n), "size": 8} for n in range(32)] * 4


def test_by_keyboard_from_a_trace_to_a_comparison(visit: Visit, service: Running, tmp_path: Path) -> None:
    trace = tmp_path / "writes.ndjson"
    trace.write_bytes(lines(WRITES))
    page = visit.open()
    keys = page.keyboard

    visit.tab_to("New machine")
    keys.press("Enter")
    visit.tab_to("^Name")
    keys.type("by keyboard")
    visit.tab_to("^Memory")
    keys.press("Control+A")
    keys.type("1 MiB")
    keys.press("Enter")
    expect(page.get_by_role("heading", name="by keyboard")).to_be_visible()
    vm = "/v1/vms/" + re.findall(r"vm_[0-9a-f]+", page.url)[0]
    assert service.client.get(vm).json()["memory_slots"][0]["size"] == "0x100000"

    def replay() -> None:
        visit.tab_to("^Replay$")
        keys.press("Enter")
        expect(page.get_by_text("Drop a trace here")).to_be_visible()
        with page.expect_file_chooser() as chooser:
            visit.tab_to("Choose a file")
            keys.press("Enter")
        chooser.value.set_files(str(trace))
        page.wait_for_url(re.compile("/replay/tr_"))

    replay()
    expect(page.get_by_role("heading", name="No write of this trace was refused.")).to_be_visible()

    # Deny the third sub-page of page 0x10 on the map.
    visit.tab_to("^Map$")
    keys.press("Enter")
    visit.tab_to("Go to an address")
    keys.type("0x10100")
    keys.press("Enter")
    expect(page.locator("aside").get_by_text("0x10100", exact=True)).to_be_visible()
    assert visit.focused().startswith("Heatmap")
    # What that would cost is said before it is done.
    expect(page.get_by_text("Denying it would refuse 4 writes of this trace, its whole page 128.")).to_be_visible()
    keys.press("Space")
    expect(page.locator("aside").get_by_text("denied", exact=True)).to_be_visible()
    assert map_of(service.client, vm, 0x10) == 0xFFFFFFFB

    replay()
    expect(page.get_by_role("heading", name=re.compile("32.* times as many exits"))).to_be_visible()
    expect(page.get_by_role("heading", name="4 exits")).to_be_visible()
    expect(page.get_by_role("region", name="Timeline").get_by_text("with whole pages")).to_be_visible()
    traces = service.client.get(f"{vm}/traces").json()["traces"]
    assert [trace["violations"] for trace in traces] == [0, 4]

    visit.tab_to("^All results$")
    keys.press("Enter")
    visit.tab_to("^Compare the last two$")
    keys.press("Enter")
    expect(page.get_by_role("heading", name="The second refuses 4 writes more.")).to_be_visible()


def test_the_map_says_where_one_is(visit: Visit, service: Running) -> None:
    vm = new_vm(service.client)
    service.client.post(
        f"{vm}/protections", json={"name": "p", "objects": [{"name": "secret", "gpa": 0x20080, "size": 256}]}
    )
    page = visit.open(f"/vms/{vm.split('/')[-1]}/map")
    heat = page.get_by_role("application")
    heat.focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_text("Page 0x20, sub-page 2, denied, secret.")).to_be_attached()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_text("Page 0x20, sub-page 3, may be written.")).to_be_attached()
    # A second click on a cell changes it; what a protection denies stays denied, and that is said.
    page.get_by_role("button", name="Sub-page 1: denied").click()
    page.get_by_role("button", name="Clear its SET bit, too").click()
    expect(page.get_by_text("its SET bit and a protection")).to_be_visible()
    page.get_by_role("button", name="Allow writes here").click()
    expect(page.get_by_text("a protection still denies it")).to_be_visible()


def test_a_trace_that_is_refused_in_the_middle(visit: Visit, service: Running, tmp_path: Path) -> None:
    bad = tmp_path / "bad.ndjson"
    bad.write_bytes(lines([*WRITES, {"gpa": "nonsense"}]))
    vm = new_vm(service.client)
    page = visit.open(f"/vms/{vm.split('/')[-1]}/replay")
    page.set_input_files("#trace-file", str(bad))
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("gpa")
    assert service.client.get(f"{vm}/traces").json()["traces"] == []
    # The page goes on: a good one is taken afterwards.
    good = tmp_path / "good.ndjson"
    good.write_bytes(lines(WRITES))
    page.set_input_files("#trace-file", str(good))
    page.wait_for_url(re.compile("/replay/tr_"))


def test_a_text_of_another_tool(visit: Visit, service: Running, tmp_path: Path) -> None:
    text = tmp_path / "lackey.txt"
    text.write_text("".join(f" S {0x10000 + 64 * n:08x},8\n" for n in range(50)), encoding="utf-8")
    vm = new_vm(service.client)
    page = visit.open(f"/vms/{vm.split('/')[-1]}/replay")
    page.set_input_files("#trace-file", str(text))
    page.wait_for_url(re.compile("/replay/tr_"))
    assert service.client.get(f"{vm}/traces").json()["traces"][0]["format"] == "lackey"


def test_the_timeline_and_the_objects_choose_exits(visit: Visit, service: Running) -> None:
    vm = new_vm(service.client)
    objects = [{"name": name, "gpa": gpa, "size": 128} for name, gpa in (("first", 0x10000), ("second", 0x11000))]
    service.client.post(f"{vm}/protections", json={"name": "p", "objects": objects})
    writes = [{"gpa": hex(0x10000 if n < 6000 else 0x11000)} for n in range(10_000)]
    trace = service.client.post(
        f"{vm}/traces", content=lines(writes), headers={"Content-Type": "application/x-ndjson"}
    ).json()
    page = visit.open(f"/vms/{vm.split('/')[-1]}/replay/{trace['id']}")
    expect(page.get_by_role("heading", name="10,000 exits")).to_be_visible()
    page.get_by_role("button", name="second", exact=True).click()
    expect(page.get_by_role("heading", name="4,000 of 10,000 exits")).to_be_visible()
    page.get_by_role("button", name="second", exact=True).click()
    # As in Perfetto: W zooms, and the table shows what is in sight.
    page.get_by_role("application").focus()
    page.keyboard.press("w")
    expect(page.get_by_role("heading", name="6,000 of 10,000 exits")).to_be_visible()
    page.get_by_role("button", name="Show everything").click()
    expect(page.get_by_role("heading", name="10,000 exits")).to_be_visible()
    # Few rows are elements, wherever one scrolls to.
    rows = page.locator(".exit-row[role=listitem]")
    page.locator(".virtual").evaluate("(list) => { list.scrollTop = list.scrollHeight; }")
    expect(page.get_by_text("9,999", exact=True)).to_be_visible()
    assert rows.count() < 60
