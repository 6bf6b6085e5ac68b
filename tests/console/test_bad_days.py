"""What the console says when something is not as it was: tokens, deleted machines, names with markup, a restart."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from playwright.sync_api import Browser, expect

from service.security.tokens import MemoryTokens, mint
from service.settings import Settings
from tests.console.chromium import Visit, visiting
from tests.support.http import new_vm
from tests.support.server import Running, running

pytestmark = pytest.mark.console

MARKUP = "<img src=x onerror=\"document.title='owned'\"><b>&amp;"


def test_names_are_text(visit: Visit, service: Running) -> None:
    vm = new_vm(service.client, name=MARKUP)
    objects = [{"name": MARKUP, "gpa": 0x10000, "size": 128, "about": MARKUP}]
    assert service.client.post(f"{vm}/protections", json={"name": "p", "about": MARKUP, "objects": objects}).is_success
    trace = service.client.post(
        f"{vm}/traces", content=b'{"gpa": 65536}\n', headers={"Content-Type": "application/x-ndjson"}
    ).json()
    where = f"/vms/{vm.split('/')[-1]}"
    result = f"{vm.split('/')[-1]}/{trace['id']}"
    places = (
        "/",
        f"{where}/map",
        f"{where}/replay",
        f"{where}/replay/{trace['id']}",
        f"{where}/live",
        f"/compare?a={result}&b={result}",
    )
    for place in places:
        page = visit.open(place)
        expect(page.get_by_text(MARKUP[:20]).first).to_be_attached()
        assert page.locator("main img").count() == 0
        assert "owned" not in page.title() or MARKUP in page.title()


def test_a_machine_that_is_deleted_under_the_page(visit: Visit, service: Running) -> None:
    vm = new_vm(service.client)
    page = visit.open(f"/vms/{vm.split('/')[-1]}/walk?gpa=0x10000")
    expect(page.locator(".sentence")).to_be_visible()
    service.client.delete(vm)
    page.get_by_role("button", name="Walk", exact=True).click()
    expect(page.get_by_text("This machine does not exist any more")).to_be_visible()
    page.get_by_role("link", name="All machines").click()
    expect(page.get_by_role("heading", name="What would your policy cost a real guest?")).to_be_visible()


def test_a_page_that_there_is_not(visit: Visit) -> None:
    expect(visit.open("/nowhere/at/all").get_by_role("alert")).to_contain_text("There is no such page")
    expect(visit.open("/vms/vm_0").get_by_role("alert")).to_contain_text("vm")


def test_the_service_goes_and_comes_back(visit: Visit, service: Running) -> None:
    vm = new_vm(service.client)
    page = visit.open(f"/vms/{vm.split('/')[-1]}/walk")
    page.get_by_label("Guest-physical address").fill("0x10000")
    page.route("**/v1/**", lambda route: route.abort())
    page.route("**/livez", lambda route: route.abort())
    page.get_by_role("button", name="Walk", exact=True).click()
    expect(page.get_by_text("The service does not answer. Looking again")).to_be_visible()
    # What was typed is still there, and goes on when the service is back.
    expect(page.get_by_label("Guest-physical address")).to_have_value("0x10000")
    page.unroute("**/v1/**")
    page.unroute("**/livez")
    expect(page.get_by_text("The service is back.")).to_be_visible()
    page.get_by_role("button", name="Walk", exact=True).click()
    expect(page.locator(".sentence")).to_be_visible()
    visit.said.clear()


@pytest.fixture
def guarded() -> tuple[MemoryTokens, list[str]]:
    tokens, secrets = MemoryTokens(), []
    for name in ("first", "second"):
        record, secret = mint(name, tenant="red", scope="write", now=datetime.now(UTC) - timedelta(seconds=5))
        tokens.add(record)
        secrets.append(secret)
    return tokens, secrets


def test_sign_in_and_a_token_that_expires(browser: Browser, guarded: tuple[MemoryTokens, list[str]]) -> None:
    tokens, secrets = guarded
    settings = Settings(warm_up=False, token_refresh=0.05)
    with running(settings, tokens) as service, visiting(browser, service.url) as visit:
        page = visit.open()
        dialog = page.get_by_role("dialog")
        dialog.get_by_label("Token").fill("nonsense")
        page.keyboard.press("Enter")
        expect(dialog.get_by_role("alert")).to_contain_text("not valid")
        dialog.get_by_label("Token").fill(secrets[0])
        page.keyboard.press("Enter")
        expect(page.get_by_text("No machine yet")).to_be_visible()
        # In memory alone: no storage of the browser has it, nor does the address.
        assert page.evaluate("JSON.stringify({...localStorage, ...sessionStorage})").find(secrets[0]) == -1
        assert page.evaluate("document.cookie") == "" and secrets[0] not in page.url
        # Revoked while a form is open: the form stays, and goes on with another token.
        page.get_by_role("button", name="New machine").click()
        page.get_by_label("Name").fill("kept")
        revoked = next(record for record in tokens.all() if record.name == "first")
        tokens.revoke(revoked.id, datetime.now(UTC))
        page.wait_for_timeout(300)
        page.get_by_role("button", name="Make it").click()
        expect(page.get_by_role("dialog").last.get_by_role("alert")).to_contain_text("not valid")
        page.get_by_role("dialog").last.get_by_label("Token").fill(secrets[1])
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="kept")).to_be_visible()
        # The WebSocket and the stream of events bring the token, too.
        page.get_by_role("link", name="Live").click()
        expect(page.get_by_text("live", exact=True)).to_be_visible()
        page.get_by_role("button", name="Attach").click()
        expect(page.get_by_text("attached, 1 tool")).to_be_visible()
        # Metrics are for admins; the page says so.
        page.get_by_role("link", name="Operator").click()
        expect(page.get_by_text("Metrics need a token with scope admin.")).to_be_visible()
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("dialog").get_by_label("Token")).to_be_visible()
