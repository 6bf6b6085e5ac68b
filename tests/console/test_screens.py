"""Every screen, light and dark, wide and narrow: nothing serious for axe, nothing wider than the window, a picture."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser

from tests.console.chromium import NARROW, SETTLED, WIDE, lines, picture, serious, visiting
from tests.support.http import access, new_vm, set_map
from tests.support.server import Running

pytestmark = pytest.mark.console

# Two frames: what listens for other colours has drawn itself anew.
REDRAWN = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
SCREENS = ("start", "map", "replay", "result", "walk", "live", "processor", "compare", "operator")


@pytest.fixture(scope="module")
def places(service: Running) -> dict[str, str]:
    vm = new_vm(service.client, name="a guest", vcpus=2, translation_cache="model")
    objects = [
        {"name": name, "gpa": gpa, "size": size}
        for name, gpa, size in (
            ("sys_call_table", 0x10360, 3616),
            ("modprobe_path", 0x2A6A0, 256),
            ("init_cred", 0x2B000, 176),
        )
    ]
    service.client.post(f"{vm}/protections", json={"name": "kernel", "objects": objects})
    set_map(service.client, vm, 0x40, 0xFFFF_0000)
    writes = [{"gpa": hex(0x10000 + (n * 712) % 0x20000), "size": 8} for n in range(6000)]
    headers = {"Content-Type": "application/x-ndjson"}
    trace = service.client.post(f"{vm}/traces", content=lines(writes), headers=headers).json()["id"]
    access(service.client, vm, gpa="0x2a6a0", size=8)
    name = vm.split("/")[-1]
    return {
        "start": "/",
        "map": f"/vms/{name}/map",
        "replay": f"/vms/{name}/replay",
        "result": f"/vms/{name}/replay/{trace}",
        "walk": f"/vms/{name}/walk?gpa=0x2a6a0",
        "live": f"/vms/{name}/live",
        "processor": f"/vms/{name}/processor",
        "compare": f"/compare?a={name}/{trace}&b={name}/{trace}",
        "operator": "/operator",
    }


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=lambda size: str(size[0]))
def test_screens(browser: Browser, service: Running, places: dict[str, str], size: tuple[int, int]) -> None:
    with visiting(browser, service.url, size, axe=True) as visit:
        for name in SCREENS:
            page = visit.open(places[name])
            page.wait_for_load_state("networkidle") if name not in ("live", "operator") else None
            page.wait_for_timeout(SETTLED)
            picture(page, f"{name}-{size[0]}-light")
            assert serious(page) == [], name
            # The same page with other colours.
            page.emulate_media(color_scheme="dark")
            page.evaluate(REDRAWN)
            picture(page, f"{name}-{size[0]}-dark")
            assert serious(page, "color-contrast") == [], f"{name}, dark"
            page.emulate_media(color_scheme="light")
            assert page.evaluate("document.documentElement.scrollWidth") <= size[0], f"{name} scrolls sideways"
