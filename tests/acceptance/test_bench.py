"""The short form of `make bench`, as a program: every contender takes everything, and every figure is measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parent.parent.parent
CONTENDERS: Final = {"ours", "inline", "task per event", "insert alone"}
UPSERTS: Final = {"bulk upsert alone (unnest)", "bulk upsert alone (executemany)"}


pytestmark = pytest.mark.timeout(180)
"""A minute of work, on a machine that does other things besides."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What a short run writes."""
    folder = tmp_path_factory.mktemp("bench")
    folder.chmod(0o711)  # the account that Postgres runs as has to pass
    path = folder / "figures.json"
    ran = subprocess.run(
        [sys.executable, "-m", "bench", "--short", "--json", str(path)],
        cwd=ROOT,
        env={"PATH": "", "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "Targets" in ran.stdout
    assert not list(folder.glob("clerk-sync-bench-*")), "a run leaves nothing behind"
    found: Mapping[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def test_every_contender_takes_every_event_and_all_become_visible(told: Mapping[str, Any]) -> None:
    levels = told["figures"]["acks"]
    assert {level["contender"] for level in levels} == CONTENDERS
    for level in levels:
        assert level["accepted"] == level["sent"] > 0, level
        assert (level["left"], level["unseen"], level["skipped"]) == (0, 0, False), level


def test_every_figure_is_measured(told: Mapping[str, Any]) -> None:
    for level in told["figures"]["acks"]:
        assert 0 < level["ack_p50_ms"] <= level["ack_p99_ms"], level
        assert level["acks_a_second"] > 0, level
        assert level["generator_us"] > 0, level
        assert (level["cpu_ms"] is not None) == (sys.platform == "linux")
        assert level["cpu_ms"] is None or level["cpu_ms"] > 0.05, level
        visible = (level["fresh_p50_ms"], level["fresh_p99_ms"])
        match level["contender"]:
            case "inline":
                assert visible == (0, 0), level  # its answer comes after its commit
            case "insert alone":
                assert visible == (None, None), level
            case _:
                assert 0 < visible[1] < 60_000, level
    assert all(math.isfinite(check["median"]) for check in told["checks"])
    assert {check["target"] for check in told["checks"]} >= {1.5, 2.5, 0.7, 0.5}


def test_a_backlog_is_drained_whole_by_each(told: Mapping[str, Any]) -> None:
    drained = {one["contender"]: one for one in told["figures"]["drain"]}
    assert drained.keys() == {"ours", "task per event", *UPSERTS}
    for one in drained.values():
        assert one["rows_a_second"] > 0, one
        assert (one["cpu_ms"] is not None) == (sys.platform == "linux")
    options = told["options"]["drain"]
    assert drained["ours"]["events"] == options["backlog"]
    assert drained["task per event"]["events"] == options["messages"]
    assert {check["target"] for check in told["checks"]} >= {15, 0.6}


def test_what_the_machine_can_do_at_most_is_measured(told: Mapping[str, Any]) -> None:
    limits = {one["what"]: one["a_second"] for one in told["figures"]["limits"]}
    assert len(limits) == 2
    assert all(a_second > 0 for a_second in limits.values())


def test_reading_a_user_is_measured_beside_a_request_of_getusers_kind(told: Mapping[str, Any]) -> None:
    calls = [one for one in told["figures"]["reading"] if "p50_ms" in one]
    assert {one["what"] for one in calls} >= {"getUser() of a stand-in", "select", "put_user"}
    for one in calls:
        assert 0 < one["p50_ms"] <= one["p99_ms"], one
        assert one["a_second"] > 0, one
    indexes = [one for one in told["figures"]["reading"] if "megabytes" in one]
    assert len(indexes) == 2
    assert all(one["megabytes"] > 0 and one["built_seconds"] > 0 for one in indexes)
