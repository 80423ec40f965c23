"""The alerts and the dashboard speak of metrics that the service has, and alerts fire when they should.

Prometheus itself says whether they can be read, and whether they fire, where its `promtool` is installed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import webhooks.app  # noqa: F401 - names the answers
from webhooks.health import Health
from worker import metrics, runs
from worker.db import Connection

ROOT: Final = Path(__file__).parents[2]
ALERTS: Final = ROOT / "ops" / "alerts.yml"
ALERT_TESTS: Final = ROOT / "ops" / "alerts_test.yml"
DASHBOARD: Final = ROOT / "ops" / "dashboard.json"
OPERATIONS: Final = ROOT / "docs" / "operations.md"

PROMTOOL: Final = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool (Debian's prometheus) isn't installed")

Exported = dict[str, dict[str, set[str]]]
"""The names of samples; of each, its labels with their values."""


def rules() -> list[dict[str, Any]]:
    """Every alert."""
    return [rule for group in yaml.safe_load(ALERTS.read_text("utf-8"))["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """What the dashboard shows."""
    found = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    assert isinstance(found, list)
    return found


def expressions() -> list[str]:
    """All PromQL: the alerts', the dashboard's and that of its variable."""
    variables = json.loads(DASHBOARD.read_text("utf-8"))["templating"]["list"]
    return [
        *(rule["expr"] for rule in rules()),
        *(target["expr"] for panel in panels() for target in panel["targets"]),
        *(variable["definition"] for variable in variables if "definition" in variable),
    ]


A_MINUTE_AGO: Final = """
insert into clerk.minutes values (date_trunc('minute', now()) - interval '1 minute', 3, 2, 1, 0.5, 1.5, 4)
"""


@pytest.fixture
def exported(connection: Connection, connect: Callable[[], Connection]) -> Exported:
    """What a receiver tells when there have been runs of each kind, and an event was applied a minute ago."""
    for kind in (runs.BACKFILL, runs.INCREMENTAL, runs.FULL):
        run = runs.begin(connection, kind, "test")
        run.state = "done"
        runs.save(connection, run)
    connection.execute(A_MINUTE_AGO)
    found: Exported = defaultdict(lambda: defaultdict(set))
    text = metrics.render(Health(connect).counts()).decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for label, value in {**sample.labels, "": ""}.items():
                found[sample.name][label].add(value)
    return found


SELECTOR: Final = re.compile(r"(clerk_sync_[a-z_]+)(?:\{([^}]*)\})?")
MATCHER: Final = re.compile(r'([a-z_]+)(=~|!=|!~|=)"([^"]*)"')
OF_SCRAPING: Final = {"job", "instance"}


def unknown(expression: str, exported: Exported) -> Iterator[str]:
    """What an expression names that the service doesn't have."""
    for name, matchers in SELECTOR.findall(expression):
        if name not in exported:
            yield name
        for label, operator, values in MATCHER.findall(matchers):
            if label in OF_SCRAPING:
                continue
            for value in values.split("|") if "~" in operator else [values]:
                if value not in exported.get(name, {}).get(label, ()):
                    yield f"{name}{{{label}={value}}}"
    names = {label for name, _ in SELECTOR.findall(expression) for label in exported.get(name, ())}
    for labels in re.findall(r"\bby \(([^)]*)\)", expression):
        yield from set(re.split(r",\s*", labels)) - names - OF_SCRAPING


def test_every_metric_label_and_value_that_is_asked_for_is_exported(exported: Exported) -> None:
    assert {expression: found for expression in expressions() if (found := list(unknown(expression, exported)))} == {}


def test_what_postgres_tells_of_the_last_minutes_is_exported_as_it_is(
    exported: Exported, connection: Connection, connect: Callable[[], Connection]
) -> None:
    text = metrics.render(Health(connect).counts()).decode()
    for line in (
        "clerk_sync_recent_acknowledged 3.0",
        "clerk_sync_recent_applied 2.0",
        'clerk_sync_recent_freshness_seconds{quantile="0.5"} 0.5',
        'clerk_sync_recent_freshness_seconds{quantile="0.99"} 1.5',
    ):
        assert line in text.splitlines()
    # Seven minutes later: events of five minutes, freshness of ten.
    connection.execute("update clerk.minutes set minute = minute - interval '7 minutes'")
    text = metrics.render(Health(connect).counts()).decode()
    assert "clerk_sync_recent_applied 0.0" in text.splitlines(), "as where no worker counts any more"
    assert 'clerk_sync_recent_freshness_seconds{quantile="0.99"} 1.5' in text.splitlines()
    connection.execute("delete from clerk.minutes")
    text = metrics.render(Health(connect).counts()).decode()
    assert "clerk_sync_recent_applied 0.0" in text.splitlines()
    assert "clerk_sync_recent_freshness_seconds{" not in text


@pytest.mark.parametrize(
    "wrong",
    ["clerk_sync_freshness", 'clerk_sync_events{state="lost"}', 'clerk_sync_users{state="dead"}',
     'clerk_sync_deliveries_total{answer=~"accepted|denied"}', "sum by (job, kind) (clerk_sync_users)"],
)  # fmt: skip
def test_a_name_that_is_not_exported_is_found(wrong: str, exported: Exported) -> None:
    assert len(list(unknown(wrong, exported))) == 1


def test_the_dashboard_shows_every_metric(exported: Exported) -> None:
    shown = {name for panel in panels() for target in panel["targets"] for name, _ in SELECTOR.findall(target["expr"])}
    parts = re.compile(r"_(bucket|sum|count|total|created)$")
    assert {parts.sub("", name) for name in exported} - {parts.sub("", name) for name in shown} == set()
    assert all(panel["title"] and panel["description"] for panel in panels())


def test_every_alert_says_how_bad_it_is_and_where_it_is_written_what_to_do() -> None:
    sections = re.findall(r"^### (ClerkSync\w+)$", OPERATIONS.read_text("utf-8"), re.MULTILINE)
    assert [rule["alert"] for rule in rules()] == sections, "one section each, in the same order"
    for rule in rules():
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert re.fullmatch(r"[0-9]+[mh]", rule["for"])
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_every_alert_is_seen_to_fire() -> None:
    fired = set(re.findall(r'alertname="(\w+)"', ALERT_TESTS.read_text("utf-8")))
    assert fired == {rule["alert"] for rule in rules()}


def promtool(*arguments: str | Path) -> None:
    """Run Prometheus's own check. Its words are the test's where it finds something."""
    assert PROMTOOL
    ran = subprocess.run([PROMTOOL, *map(str, arguments)], check=False, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@needs_promtool
def test_alerts_fire_when_they_should_and_not_otherwise() -> None:
    promtool("check", "rules", ALERTS)
    promtool("test", "rules", ALERT_TESTS)


@needs_promtool
def test_prometheus_can_read_what_the_dashboard_asks(tmp_path: Path) -> None:
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    named = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m").replace("$job", ".+")}
        for number, expression in enumerate(asked)
    ]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": named}]}), "utf-8")
    promtool("check", "rules", file)
