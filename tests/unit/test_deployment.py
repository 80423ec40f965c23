"""The Procfile says how each process is run; the units, the compose file and the documentation say the same."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from worker.supervise import parse_procfile

ROOT: Final = Path(__file__).parents[2]
PROCFILE: Final = parse_procfile((ROOT / "Procfile").read_text("utf-8"))
OPERATIONS: Final = (ROOT / "docs" / "operations.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("process", "unit"),
    [("release", "migrate"), ("web", "web"), ("worker", "worker@"), ("beat", "beat")],
)
def test_units_run_what_the_procfile_runs(process: str, unit: str) -> None:
    text = (ROOT / "ops" / "systemd" / f"clerk-sync-{unit}.service").read_text("utf-8")
    (command,) = re.findall(r"^ExecStart=/opt/clerk-sync/bin/(.*)$", text, re.MULTILINE)
    assert command == PROCFILE[process]


def test_the_compose_file_runs_what_the_procfile_runs() -> None:
    services: dict[str, Any] = yaml.safe_load((ROOT / "compose.yml").read_text("utf-8"))["services"]
    commands = {name: service["command"] for name, service in services.items() if service.get("image") == "clerk-sync"
                and "command" in service}  # fmt: skip
    assert commands == {
        "migrate": shlex.split(PROCFILE["release"]),
        "worker": shlex.split(PROCFILE["worker"]),
        "beat": shlex.split(PROCFILE["beat"]),
    }
    (image,) = re.findall(r"^CMD (\[.*\])$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
    assert yaml.safe_load(image) == shlex.split(PROCFILE["web"])


def test_documented_platforms_run_what_the_procfile_runs() -> None:
    written = re.findall(r"(?:celery --quiet|gunicorn --config)[^\n\"]*", OPERATIONS)
    assert len(written) == 5
    assert set(written) == {PROCFILE["web"], PROCFILE["worker"], PROCFILE["beat"]}


def test_links_inside_the_page_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", OPERATIONS, re.MULTILINE)
    }
    links = set(re.findall(r"\]\(#([^)]*)\)", OPERATIONS))
    assert links - anchors == set()
    for path in set(re.findall(r"\]\((?!https?:|#)([^)#]*)", OPERATIONS)):
        assert (ROOT / "docs" / path).exists(), path
