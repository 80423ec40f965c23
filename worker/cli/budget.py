"""`clerk-sync budget report|check|suggest|reweigh`."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import click
import psycopg
from rich.console import Console
from rich.progress import Progress, track

from worker import db, users
from worker.budget import Exactly, check, report
from worker.claims import Weighed, Weights
from worker.cli.charts import console, plural
from worker.cli.options import connect, info_option, json_option, settings, to_json
from worker.cli.summary import draw_checked, draw_report, draw_suggestion, findings
from worker.errors import ConfigError, SyncError
from worker.policy import Policy
from worker.suggest import suggest
from worker.template import Finding, Template, lint


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
    with _population(found.database_url, found.policy, found.policy.template, quiet=as_json) as (population, exactly):
        made = report(population, found.policy, exactly)
    if html is not None:
        # Loaded here: it takes a tenth of a second, and only a page needs it.
        from worker.cli.page import render  # noqa: PLC0415

        _write(html, render(made))
    if as_json:
        click.echo(to_json(dataclasses.asdict(made)))
        return
    out = console()
    draw_report(out, made)
    if html is not None:
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
    parsed, warnings = _linted(_source(template), as_json=as_json)
    found = settings(info, "database_url")
    with _population(found.database_url, found.policy, parsed, quiet=as_json) as (population, exactly):
        checked = check(population, parsed, found.policy, exactly)
    if as_json:
        told = {"fits": checked.fits, **dataclasses.asdict(checked), "warnings": [str(one) for one in warnings]}
        click.echo(to_json(told))
    else:
        draw_checked(console(), checked, warnings)
    sys.exit(0 if checked.fits else 1)


@budget.command("suggest", short_help="Suggest a template that fits.")
@click.option(
    "--keep",
    metavar="FIELD",
    multiple=True,
    help="A field to carry, such as public_metadata.role; the most important first. Default: as many as fit.",
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

    What SESSION_CLAIMS carries besides metadata stays. Exits 1 where that alone is over the budget.
    """
    wanted = [name.removeprefix("user.") for value in keep for name in re.split(r"[\s,]+", value) if name]
    if not 0 < percentile <= 100:
        raise click.BadParameter("must be more than 0 and at most 100", param_hint="--percentile")
    for name in wanted:
        if not name.startswith(("public_metadata.", "unsafe_metadata.")):
            raise click.BadParameter(
                f"{name!a} is no field a token can carry: write public_metadata.NAME or unsafe_metadata.NAME",
                param_hint="--keep",
            )
    found = settings(info, "database_url")
    with _population(found.database_url, found.policy, found.policy.template, quiet=as_json) as (population, _):
        suggestion = suggest(population, found.policy, wanted, percentile)
    if as_json:
        click.echo(to_json(dataclasses.asdict(suggestion)))
    else:
        draw_suggestion(console(), suggestion)
    sys.exit(1 if suggestion.template is None else 0)


@budget.command("reweigh", short_help="Weigh users again after settings changed.")
@info_option
@json_option
def reweigh_users(*, info: Path | None, as_json: bool) -> None:
    """Weigh users again after SESSION_CLAIMS, the budget or a COPY_ setting changed.

    \b
    SESSION_CLAIMS=@claims.json clerk-sync budget reweigh

    Each user's next event does the same; this does it now, from the kept sizes. Copies that the token carries under
    the new settings are dropped. Run it with the settings that the workers have; it may be cut short and run again.
    """
    found = settings(info, "database_url")
    try:
        with connect(found.database_url) as connection:
            result = _reweigh(connection, found.policy, quiet=as_json)
    except psycopg.Error as error:
        raise _failed(error) from None
    if as_json:
        click.echo(to_json({name: getattr(result, name) for name in ("users", "over", "dropped", "missing")}))
        return
    if not result.users:
        click.echo("Every user is weighed by the present settings: nothing to do.")
        return
    click.echo(f"Weighed again: {plural(result.users, 'user')}, of them {result.over:,} over the budget now.")
    if result.dropped:
        click.echo(f"Copies that aren't needed any more were dropped for {plural(result.dropped, 'user')}.")
    if result.missing:
        click.echo(
            f"For {plural(result.missing, 'user')}, metadata is to be copied now that only Clerk holds: it comes with "
            "their next event."
        )


def _reweigh(connection: db.Connection, policy: Policy, *, quiet: bool) -> users.Reweighed:
    _, stale = users.count(connection, policy.fingerprint)
    errors = Console(stderr=True)
    if quiet:
        return users.reweigh_all(connection, policy)
    if not errors.is_terminal:
        if stale:
            click.echo(f"{plural(stale, 'user')} to weigh again.")
        return users.reweigh_all(connection, policy)
    with Progress(console=errors, transient=True) as progress:
        task = progress.add_task("Weighing again", total=stale)
        return users.reweigh_all(connection, policy, lambda batch: progress.advance(task, batch.users))


@contextlib.contextmanager
def _population(
    database_url: str, policy: Policy, template: Template, *, quiet: bool
) -> Iterator[tuple[Iterator[Weighed], Exactly]]:
    """Every user's weights, and who to ask what one user's claims weigh exactly under a template."""
    asked = dataclasses.replace(policy, template=template)
    try:
        # The first connection is busy streaming while the second one answers.
        with connect(database_url) as streaming, connect(database_url) as answering:

            def exactly(weights: Weights) -> int | None:
                low, high = users.exactly(answering, asked, weights)
                return low if low == high else None

            total, _ = users.count(streaming, policy.fingerprint)
            with contextlib.closing(_watched(users.population(streaming, policy.fingerprint), total, quiet)) as people:
                yield people, exactly
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


def _source(template: str) -> str:
    """The text of a template: as given, or from the file or standard input that is named."""
    if template.lstrip().startswith("{"):
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
    return click.BadParameter(
        f"{shown!a} {problem}. Give the template's JSON, which begins with {{, or a file of it: FILE, @FILE, or - for "
        "standard input.",
        param_hint="TEMPLATE",
    )


def _linted(source: str, *, as_json: bool) -> tuple[Template, tuple[Finding, ...]]:
    """The template with its warnings; ends the command with 2 where it has an error."""
    template, found = lint(source)
    errors = [finding for finding in found if finding.severity == "error"]
    if template is not None and not errors:
        return template, found
    if as_json:
        click.echo(to_json({"errors": [dataclasses.asdict(finding) for finding in found]}))
    findings(Console(stderr=True, highlight=False, markup=False, emoji=False), found)
    sys.exit(2)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path} can't be written ({type(error).__name__})") from None
