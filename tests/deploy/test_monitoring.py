"""The dashboard and the alert rules: each metric and label in them is one that the service exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.settings import Settings
from tests.support.server import running

DEPLOY = Path(__file__).parents[2] / "deploy"
BOARD = json.loads((DEPLOY / "grafana" / "subpage.json").read_text(encoding="utf-8"))
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
# Labels that Prometheus adds itself.
SCRAPED = {"instance", "job", "le"}


def expressions() -> Iterator[tuple[str, str]]:
    for panel in BOARD["panels"]:
        for target in panel.get("targets", []):
            yield f"panel {panel['title']}", target["expr"]
    for rule in RULES:
        yield f"alert {rule['alert']}", rule["expr"]


EXPRESSIONS = list(expressions())


@pytest.fixture(scope="module")
def exported() -> dict[str, str]:
    """The kind of each metric, by name: counters as they are sampled."""
    with running(Settings(warm_up=False)) as service:
        families = list(text_string_to_metric_families(service.client.get("/metrics").text))
    return {f"{one.name}_total" if one.type == "counter" else one.name: one.type for one in families}


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS, ids=[where for where, _ in EXPRESSIONS])
def test_each_metric_is_exported(where: str, expression: str, exported: dict[str, str]) -> None:
    names = re.findall(r"\b(?:subpage|process)_\w+", expression)
    assert names or expression.startswith("up{"), where
    for name in names:
        part = re.sub(r"_(bucket|count|sum)$", "", name)
        kind = exported.get(name) or (exported.get(part) if part != name else None)
        assert kind is not None, f"{where}: {name} is not exported"
        # A counter is only of use by its rate; of a histogram one takes the quantile of its buckets.
        if kind == "counter":
            assert re.search(rf"(rate|increase)\({name}", expression), where
        if name.endswith("_bucket"):
            assert "histogram_quantile(" in expression and re.search(r"by \([^)]*\ble\b", expression), where


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS, ids=[where for where, _ in EXPRESSIONS])
def test_each_label_is_one_of_the_metrics(where: str, expression: str) -> None:
    source = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (
            DEPLOY.parent / "service" / "telemetry" / "metrics.py",
            DEPLOY.parent / "service/runtime/census.py",
        )
    )
    known = SCRAPED | {
        name for listed in re.findall(r"\[((?:\"\w+\",? ?)+)\]", source) for name in re.findall(r"\w+", listed)
    }
    used = set(re.findall(r"(\w+)(?:=~|!=|!~|=)\"", expression))
    used |= {name.strip() for listed in re.findall(r"by \(([^)]*)\)", expression) for name in listed.split(",")}
    assert used <= known, f"{where}: {used - known}"


def test_alerts_say_what_to_do() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_panels_have_a_description_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["description"]
