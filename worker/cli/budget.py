"""`clerk-sync budget report|check|suggest|reweigh`."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import psycopg
from rich.console import Console
from rich.progress import Progress, track

from worker import db, users
from worker.budget import KINDS, Exactly, check, report
from worker.claims import Weighed, Weights
from worker.cli.charts import console
from worker.cli.options import connect, info_option, json_option, settings, to_json
from worker.cli.summary import draw_checked, draw_report, draw_suggestion, findings, keeps_all
from worker.errors import SyncError
from worker.jsontext import visible
from worker.policy import Copy, Policy
from worker.suggest import suggest
from worker.template import Finding, Template, lint
from worker.words import plural


@click.group()
def budget() -> None:
    """See what the session token carries of every user, and keep it within its budget.

    \b
    How close is everybody?                     clerk-sync budget report
    Would this template fit all users?          clerk-sync budget check claims.json
    Which template would?                       clerk-sync budget suggest --keep public_metadata.role
    After SESSION_CLAIMS or COPY_... changed:   clerk-sync budget reweigh

    Clerk's session cookie is dropped where it grows over 4,096 bytes, and sign-in breaks; so Clerk advises to stay
    under 1.2 KB of custom claims (SESSION_CLAIMS_BUDGET, 1200). Everything is weighed from the sizes kept in Postgres.
    """


@budget.command("report", short_help="Show what the claims of all users weigh.")
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Write the report to this file too, as a page."
)
@info_option
@json_option
def report_claims(*, html: Path | None, info: Path | None, as_json: bool) -> None:
    """Show what the custom claims of all users weigh.

    \b
    clerk-sync budget report
    clerk-sync budget report --html budget.html

    Shows who is over the budget, which fields are to blame, and what the session cookie comes to. The page stands
    alone and names fields and user ids, no values. Exits 0 also where users are over: see budget check.
    """
    if html is not None and not html.absolute().parent.is_dir():
        raise click.BadParameter(f"there is no folder {html.parent} to write to", param_hint="--html")
    found = settings(info, "database_url")
    with _population(found.database_url, found.policy, found.policy.template, quiet=as_json) as population:
        made = report(population.users, found.policy, population.exactly)
    if as_json:
        click.echo(to_json({**dataclasses.asdict(made), "missing": population.missing}))
    else:
        draw_report(console(), made, population.missing)
    if html is None:
        return
    # Loaded here: it takes a tenth of a second, and only a page needs it.
    from worker.cli.page import render  # noqa: PLC0415

    _write(html, render(made, population.missing))
    if not as_json:
        click.echo(f"\nThe same as a page: {html}")


@budget.command("check", short_help="Tell whether a template is right and fits all users.")
@click.argument("template")
@info_option
@json_option
def check_template(*, template: str, info: Path | None, as_json: bool) -> None:
    """Tell whether TEMPLATE is right, and whether it would fit all users.

    TEMPLATE is the JSON of a claims template, a file of it (FILE or @FILE), or - for standard input.

    \b
    clerk-sync budget check claims.json
    clerk-sync budget check '{"role": "{{user.public_metadata.role}}"}'

    Exits 2 where it has an error, each told with its line and column; 1 where a user would be over the budget; 0
    where everybody fits. A user whose exact weight isn't known is counted by an upper bound.
    """
    source = _source(template)
    # What the template may name is a setting; where the users are isn't needed before it is right.
    parsed, warnings = _linted(source, settings(info).policy.assumed, as_json=as_json)
    found = settings(info, "database_url")
    with _population(found.database_url, found.policy, parsed, quiet=as_json) as population:
        checked = check(population.users, parsed, found.policy, population.exactly)
    if as_json:
        told = {"fits": checked.fits, **dataclasses.asdict(checked), "findings": _told(warnings)}
        click.echo(to_json(told))
    else:
        draw_checked(console(), checked, warnings)
    sys.exit(0 if checked.fits else 1)


@budget.command("suggest", short_help="Suggest a template that fits.")
@click.option(
    "--keep",
    metavar="FIELD",
    multiple=True,
    help="A field to carry, such as public_metadata.role; the most important first. Default: as many as fit of those "
    "that at least 1 % of the users have.",
)
@click.option(
    "--percentile",
    type=float,
    default=100.0,
    show_default=True,
    help="The percentage of users that must fit.",
)
@info_option
@json_option
def suggest_template(*, keep: tuple[str, ...], percentile: float, info: Path | None, as_json: bool) -> None:
    """Suggest a template that fits, and the SQL that reads what it leaves out.

    \b
    clerk-sync budget suggest
    clerk-sync budget suggest --keep public_metadata.role --keep unsafe_metadata.theme
    clerk-sync budget suggest --keep "public_metadata.role, public_metadata.plan" --percentile 99

    Without --keep, it tries the fields that at least 1 % of the users have: the most common first, then the smallest.
    Claims of SESSION_CLAIMS that carry metadata are replaced whole; the others stay. Exits 1 where a field asked for
    isn't kept, where what stays is over the budget by itself, and where there are no users yet.
    """
    wanted = [name.removeprefix("user.") for value in keep for name in re.split(r"[\s,]+", value) if name]
    if not 0 < percentile <= 100:
        raise click.BadParameter("must be more than 0 and at most 100", param_hint="--percentile")
    for name in wanted:
        _check_field(name)
    found = settings(info, "database_url")
    with _population(found.database_url, found.policy, found.policy.template, quiet=as_json) as population:
        suggestion = suggest(population.users, found.policy, wanted, percentile)
    if as_json:
        click.echo(to_json(dataclasses.asdict(suggestion)))
    else:
        copies = zip(KINDS, (found.policy.public, found.policy.unsafe), strict=True)
        draw_suggestion(console(), suggestion, [kind for kind, copy in copies if copy is Copy.NEVER])
    sys.exit(0 if keeps_all(suggestion) else 1)


def _check_field(name: str) -> None:
    """Refuse what isn't written like a top-level field; a name with a dot could be no path in a template anyway."""
    kind, _, path = name.partition(".")
    field, *below = path.split(".")
    if kind not in KINDS or not field:
        raise click.BadParameter(
            f"{name!a} is no field a token can carry: write public_metadata.NAME or unsafe_metadata.NAME",
            param_hint="--keep",
        )
    if below:
        raise click.BadParameter(
            f"only top-level fields can be suggested: {visible(f'{kind}.{field}')}", param_hint="--keep"
        )


@budget.command("reweigh", short_help="Weigh users again after settings changed.")
@click.option("--drop", is_flag=True, help="Erase copies that the token carries now.")
@info_option
@json_option
def reweigh_users(*, drop: bool, info: Path | None, as_json: bool) -> None:
    """Weigh users again after SESSION_CLAIMS, the budget or a COPY_ setting changed.

    \b
    SESSION_CLAIMS=@claims.json clerk-sync budget reweigh
    SESSION_CLAIMS=@claims.json clerk-sync budget reweigh --drop

    Each user's next event does the same; this does it now, from the kept sizes. Run it with the settings that the
    workers have; it may be cut short and run again.

    Copies that the token is to carry under the new settings are kept, as it carries them only once the new template
    is out: then --drop weighs everybody and erases them. They come back only with a user's next event.
    """
    found = settings(info, "database_url")
    try:
        with connect(found.database_url) as connection:
            result = _reweigh(connection, found.policy, drop=drop, quiet=as_json)
    except psycopg.Error as error:
        raise _failed(error) from None
    if as_json:
        names = ("users", "over", "droppable", "dropped", "missing")
        click.echo(to_json({name: getattr(result, name) for name in names}))
    elif not result.users:
        click.echo("No users yet." if drop else "Every user is weighed by the present settings: nothing to do.")
    else:
        _print_reweighed(result)


def _print_reweighed(result: users.Reweighed) -> None:
    click.echo(f"Weighed again: {plural(result.users, 'user')}, of them {result.over:,} over the budget now.")
    if result.dropped:
        click.echo(f"Copies that aren't needed any more were erased for {plural(result.dropped, 'user')}.")
    elif result.droppable:
        click.echo(
            f"For {plural(result.droppable, 'user')} there are copies that aren't needed any more. They are kept; to "
            "erase them once the token with the new template is out: clerk-sync budget reweigh --drop"
        )
    if result.missing:
        click.echo(
            f"For {plural(result.missing, 'user')}, metadata is to be copied now that only Clerk holds: it comes with "
            "their next event, or now by clerk-sync refresh --missing."
        )


def _reweigh(connection: db.Connection, policy: Policy, *, drop: bool, quiet: bool) -> users.Reweighed:
    counted = users.count(connection, policy.fingerprint)
    total = counted.users if drop else counted.stale
    errors = Console(stderr=True)
    if quiet:
        return users.reweigh_all(connection, policy, drop=drop)
    if not errors.is_terminal:
        if total:
            click.echo(f"{plural(total, 'user')} to weigh again.")
        return users.reweigh_all(connection, policy, drop=drop)
    with Progress(console=errors, transient=True) as progress:
        task = progress.add_task("Weighing again", total=total)
        return users.reweigh_all(connection, policy, lambda batch: progress.advance(task, batch.users), drop=drop)


class _Population(NamedTuple):
    """Every user's weights; who to ask what one user's claims weigh exactly under a template; and of how many users
    metadata is to be copied that only Clerk has."""

    users: Iterator[Weighed]
    exactly: Exactly
    missing: int


@contextlib.contextmanager
def _population(database_url: str, policy: Policy, template: Template, *, quiet: bool) -> Iterator[_Population]:
    """All users as they are now, to be read within."""
    asked = dataclasses.replace(policy, template=template)
    try:
        # The first connection is busy streaming while the second one answers.
        with connect(database_url) as streaming, connect(database_url) as answering:

            def exactly(weights: Weights) -> int | None:
                low, high = users.exactly(answering, asked, weights)
                return low if low == high else None

            counted = users.count(streaming, policy.fingerprint)
            everybody = users.population(streaming, policy.fingerprint)
            with contextlib.closing(_watched(everybody, counted.users, quiet)) as people:
                yield _Population(people, exactly, counted.missing)
    except psycopg.Error as error:
        raise _failed(error) from None


def _watched(people: Iterator[Weighed], total: int, quiet: bool) -> Generator[Weighed, None, None]:
    """The same users, with a progress bar for whoever waits at a terminal."""
    errors = Console(stderr=True)
    if quiet or not errors.is_terminal:
        yield from people
    else:
        yield from track(people, "Weighing", total=total, console=errors, transient=True)


def _failed(error: psycopg.Error) -> SyncError:
    return SyncError(f"Postgres failed: {db.describe(error)}")


_HOW_TO_GIVE: Final = (
    "Give the template's JSON, which begins with {, or a file of it: FILE, @FILE, or - for standard input."
)


def _source(template: str) -> str:
    """The text of a template: as given, or from the file or standard input that is named."""
    if not template.strip():
        raise click.UsageError(f"TEMPLATE is empty. {_HOW_TO_GIVE}")
    if template.lstrip().startswith(("{", "[", '"')):
        return template
    try:
        if template == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        path = Path(template.removeprefix("@"))
        if template.startswith("@") or path.exists():
            return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        # A long text that is no JSON ends here too: no file can have such a name.
        raise _no_template(template, f"can't be read ({type(error).__name__})") from None
    raise _no_template(template, "is neither JSON nor a file that is there")


def _no_template(template: str, problem: str) -> click.BadParameter:
    shown = template if len(template) <= 60 else f"{template[:60]}..."
    return click.BadParameter(f"{shown!a} {problem}. {_HOW_TO_GIVE}", param_hint="TEMPLATE")


def _linted(source: str, declared: Collection[str], *, as_json: bool) -> tuple[Template, tuple[Finding, ...]]:
    """The template with its warnings; ends the command with 2 where it has an error."""
    template, found = lint(source, declared)
    errors = [finding for finding in found if finding.severity == "error"]
    if template is not None and not errors:
        return template, found
    if as_json:
        click.echo(to_json({"findings": _told(found)}))
    findings(Console(stderr=True, highlight=False, markup=False, emoji=False), found)
    sys.exit(2)


def _told(found: tuple[Finding, ...]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(finding) for finding in found]


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SyncError(f"--html {path} can't be written ({type(error).__name__})") from None
