"""`make bench`: measures the product beside the usual designs and beside the least that must be done."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import acks, drain, limits, reading, servers
from bench.report import Check, checks_table, machine
from worker.errors import ConfigError, SyncError

WIDTH: Final = 160
"""What tables get where the output isn't a terminal's."""


class Part(Protocol):
    """What each part's module has. Its Options are a frozen dataclass with defaults, SHORT is one of them."""

    Options: Any
    SHORT: Any
    run: Callable[..., Sequence[Any]]
    steps: Callable[[Any], int]
    tables: Callable[[Sequence[Any]], list[Table]]
    checks: Callable[[Sequence[Any]], list[Check]]


PARTS: Final[dict[str, Any]] = {"acks": acks, "drain": drain, "limits": limits, "reading": reading}


@click.command(context_settings={"max_content_width": 110})
@click.argument("parts", nargs=-1, type=click.Choice(["all", *PARTS]), metavar="[all|" + "|".join(PARTS) + "]...")
@click.option("--rounds", type=click.IntRange(1, 10), help="How often each is measured, all taking turns.  [2]")
@click.option("--seconds", type=click.FloatRange(0.2, 60), help="acks: how long at each rate.  [2.5]")
@click.option("--rates", "--rate", multiple=True, type=click.IntRange(1, 20_000), help="acks: events a second; repeat.")
@click.option("--users", multiple=True, type=click.IntRange(1000, 10_000_000), help="Populations; all is measured with "
              "the first one, the others for comparison; repeat.  [1000000, 10000]")  # fmt: skip
@click.option("--changing", multiple=True, type=click.FloatRange(0, 1), help="Shares of events that change something, "
              "the smaller ones first; repeat.  [0.1, 1.0]")  # fmt: skip
@click.option("--connections", type=click.IntRange(1, 500), help="acks: the load generator's.  [32]")
@click.option("--backlog", type=click.IntRange(2000, 5_000_000), help="drain: events to begin with.  [100000]")
@click.option(
    "--rivals-server", type=click.Choice(["gthread", "ours"]), help="acks: the rivals' web server.  [gthread]"
)
@click.option("--rivals-pool", type=click.Choice(["prefork", "threads"]), help="Their Celery pool.  [prefork]")
@click.option("--short", is_flag=True, help="Everything once, for some seconds: shows that it works, and no figures.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures there.")
def main(parts: tuple[str, ...], short: bool, json_path: Path | None, **given: Any) -> None:
    """Measure clerk-sync beside the usual designs, in one run on the same servers, all taking turns.

    \b
    ours            every process of the Procfile
    inline          Flask verifies, and upserts the user within the request
    task per event  Flask verifies, and sends the event to a Celery worker, which upserts the user
    insert alone    our web server, and an insert and commit for each request: the least that must be done

    acks sends deliveries at fixed rates, whether or not they are answered, and then as many as are taken: how fast
    they are answered, when their users are visible in Postgres, and what it costs. drain has a backlog applied,
    limits measures the signature check and the commit by themselves, and reading an application's queries beside
    requests of getUser()'s kind.

    Everything runs on this machine: what else runs here shows in the figures. Shown are medians over the rounds, with
    the least and the most.
    """
    chosen = [name for name in PARTS if not parts or "all" in parts or name in parts]
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    options = {name: _options(PARTS[name], short, given) for name in chosen}
    about = machine()
    found: dict[str, Sequence[Any]] = {}
    steps = sum(PARTS[name].steps(options[name]) for name in chosen)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress, servers.running() as running:
            bar = progress.add_task("starting", total=steps)

            def tell(what: str) -> None:
                # What is told begins now; what was told before is done.
                progress.update(bar, description=what, completed=told[0])
                told[0] += 1

            told = [0]
            for name in chosen:
                found[name] = PARTS[name].run(running, options[name], tell)
            progress.update(bar, description="done", completed=steps)
    except (ConfigError, SyncError) as error:
        raise click.ClickException(str(error)) from error
    checks = [check for name in chosen for check in PARTS[name].checks(found[name])]
    for name in chosen:
        for table in PARTS[name].tables(found[name]):
            console.print(table)
    console.print(checks_table(checks))
    console.print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items()), highlight=False)
    if json_path:
        _write(json_path, about, options, found, checks)


def _options(part: Part, short: bool, given: dict[str, Any]) -> Any:
    """The part's options, with those of the command line that it knows."""
    known = {field.name for field in dataclasses.fields(part.Options)}
    said = {name: value for name, value in given.items() if name in known and value not in {None, ()}}
    return dataclasses.replace(part.SHORT if short else part.Options(), **said)


def _write(
    path: Path, about: dict[str, Any], options: dict[str, Any], found: dict[str, Sequence[Any]], checks: Sequence[Check]
) -> None:
    told = {
        "machine": about,
        "options": {name: dataclasses.asdict(one) for name, one in options.items()},
        "figures": {name: [dataclasses.asdict(one) for one in ones] for name, ones in found.items()},
        "checks": [check.as_json() for check in checks],
    }
    path.write_text(json.dumps(told, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
