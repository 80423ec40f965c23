"""The session-token budget in words and tables: a report, a template that was checked, one that is suggested."""

from __future__ import annotations

import json
import shlex
from typing import Final, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker.budget import Checked, Cookie, Field, Report
from worker.cli.charts import NAME_CELLS, WIDEST, ascii_only, blocks, cut, histogram, percent, plural, visible, worst
from worker.suggest import Suggestion
from worker.template import Finding

LISTED: Final = 15
"""How many fields are shown; JSON and the page have all."""


class Note(NamedTuple):
    """What the reader of a report should know, and the command that does something about it."""

    text: str
    command: str | None = None


def notes(report: Report) -> list[Note]:
    """What follows from a report, the gravest first."""
    found = []
    if report.over:
        found.append(
            Note(
                f"{plural(report.over, 'user')} {_is(report.over)} over the budget. For a template that fits:",
                "clerk-sync budget suggest",
            )
        )
    if report.template is None:
        found.append(
            Note(
                "SESSION_CLAIMS is not set, so the assumed template is weighed: it carries public and unsafe metadata "
                "whole. Set it to the claims from Clerk's Dashboard, Sessions, Customize session token."
            )
        )
    if report.stale:
        found.append(
            Note(
                f"{plural(report.stale, 'user')} {_was(report.stale)} last weighed by another template, budget or "
                "COPY_ setting; the figures here are measured anew. To weigh and decide again what is copied:",
                "clerk-sync budget reweigh",
            )
        )
    if report.inexact:
        found.append(
            Note(
                f"{plural(report.inexact, 'user')} {_is(report.inexact)} counted by an upper bound: sizes are kept of "
                "top-level fields, and the template carries something else."
            )
        )
    return found


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _was(number: int) -> str:
    return "was" if number == 1 else "were"


def assumed_setting(report: Report) -> str:
    """The environment variable that sets an assumed size, with one of the report's as the example."""
    name, size = next(iter(report.assumed.items()))
    return f"SESSION_CLAIMS_ASSUMED_BYTES={shlex.quote(json.dumps({name: size}))}"


def draw_report(out: Console, report: Report) -> None:
    """Print a report."""
    out.print(Text.assemble(("Session-token budget", "bold"), f": {report.budget:,} bytes of custom claims"))
    if report.users:
        _summary(out, report)
        _heading(out, "Users by the bytes of their claims")
        for line in histogram(report.histogram, report.budget, min(out.width, WIDEST), plain=ascii_only(out)):
            out.print(line, no_wrap=True)
        _heading(out, "The heaviest users")
        out.print(worst(report.worst, report.budget, out.width, plain=ascii_only(out)))
        _fields(out, report)
        _cookie(out, report.cookie)
    else:
        out.print("No users yet: nothing to weigh.")
    _assumed(out, report)
    found = notes(report)
    if found or report.warnings:
        _heading(out, "Notes")
    for note in found:
        _item(out, Text(note.text))
        if note.command:
            out.print(Text(f"    {note.command}", "bold"), soft_wrap=True)
    for warning in report.warnings:
        _warning(out, warning)


def _heading(out: Console, text: str) -> None:
    out.print()
    out.print(Text(text, "bold"))


def _item(out: Console, text: Text) -> None:
    grid = Table.grid(padding=(0, 1))
    grid.add_row("-", text)
    out.print(grid)


def _warning(out: Console, warning: str) -> None:
    _item(out, Text.assemble(("Warning", "yellow"), f": {visible(warning)}"))


def _summary(out: Console, report: Report) -> None:
    over = Text("none over the budget", "green")
    if report.over:
        over = Text(f"{report.over:,} over the budget ({percent(report.over, report.users)})", "red")
    out.print(Text.assemble(plural(report.users, "user"), ", ", over))
    out.print()
    table = Table(box=None, pad_edge=False, padding=(0, 4, 0, 0))
    for name in ("p50", "p90", "p99", "max"):
        table.add_column(name, justify="right", header_style="dim", no_wrap=True)
    figures = (report.p50, report.p90, report.p99, report.max)
    table.add_column(no_wrap=True)
    cells = [Text(f"{size:,}", "red" if size > report.budget else "") for size in figures]
    table.add_row(*cells, Text("bytes of claims", "dim"))
    out.print(table)


def _fields(out: Console, report: Report) -> None:
    if not report.fields:
        return
    _heading(out, "Metadata fields, the largest in all first")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("field", no_wrap=True)
    for name in ("users", "largest", "of all claims"):
        table.add_column(name, justify="right", no_wrap=True)
    room = max(12, min(NAME_CELLS, out.width - 40))
    for field in report.fields[:LISTED]:
        table.add_row(Text(cut(field.name, room)), f"{field.users:,}", f"{field.largest:,}", _share(field))
    out.print(table)
    more = len(report.fields) - LISTED + report.other_fields
    if more > 0:
        out.print(Text(f"and {more:,} more: see --json or --html", "dim"))


def _share(field: Field) -> Text:
    return Text(percent(field.share)) if field.carried else Text("not carried", "dim")


def _cookie(out: Console, cookie: Cookie) -> None:
    _heading(out, f"The session cookie, estimated; browsers drop it over {cookie.limit:,} bytes")
    table = Table.grid(padding=(0, 2, 0, 0))
    room = max(8, min(out.width, WIDEST) - 44)
    for name, size in (
        ("median user", cookie.median),
        ("heaviest user", cookie.largest),
        ("with an organization", cookie.largest_with_org),
    ):
        over = size > cookie.limit
        drawn = blocks(size / cookie.limit, room, plain=ascii_only(out))
        table.add_row(
            name,
            Text(drawn.ljust(room), "red" if over else "cyan", no_wrap=True),
            Text(f"{size:,}", "red" if over else "", justify="right"),
            Text("over" if over else percent(size, cookie.limit), "red" if over else "dim", justify="right"),
        )
    out.print(table)
    out.print(f"{cookie.largest_claims:,} bytes of claims just fit, without an organization. Assumed here:")
    for assumption in cookie.assumptions:
        _item(out, Text(visible(assumption), "dim"))


def _assumed(out: Console, report: Report) -> None:
    if not report.assumed:
        return
    _heading(out, "Weighed by assumption: no user event tells their size")
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, size in report.assumed.items():
        table.add_row(Text(cut(name)), Text(f"{size:,} bytes", justify="right"))
    out.print(table)
    out.print(Text("To change one, set for example"))
    out.print(Text(f"  {visible(assumed_setting(report))}"), soft_wrap=True)


def draw_checked(out: Console, checked: Checked, warnings: tuple[Finding, ...]) -> None:
    """Print how a template fits all users."""
    users = plural(checked.users, "user")
    budget = f"the budget of {checked.budget:,} bytes"
    if not checked.users:
        out.print(f"The template is well-formed. No users yet: nothing to weigh against {budget}.")
    elif checked.fits:
        out.print(f"All {users} fit {budget} under this template; the heaviest has {checked.max:,}.")
    else:
        _over(out, checked, users, budget)
        _heading(out, "The heaviest users under this template")
        out.print(worst(checked.worst, checked.budget, out.width, plain=ascii_only(out)))
    if warnings:
        out.print()
    for warning in warnings:
        _warning(out, str(warning))


def _over(out: Console, checked: Checked, users: str, budget: str) -> None:
    over = checked.over + checked.over_bounds
    told = f"{over:,} of {users} would be over {budget}; the heaviest has {checked.max:,}."
    out.print(Text(told, "red"))
    if checked.over_bounds:
        out.print(
            Text(
                f"{checked.over_bounds:,} of them {_is(checked.over_bounds)} counted by an upper bound and may fit: "
                "the size of what the template carries of them isn't kept."
            )
        )


def findings(out: Console, found: tuple[Finding, ...]) -> None:
    """Print what is wrong with a template, each with its position."""
    errors = sum(finding.severity == "error" for finding in found)
    out.print(Text(f"The template has {plural(errors, 'error')}:", "red"), soft_wrap=True)
    for finding in found:
        mark = "" if finding.severity == "error" else "warning: "
        out.print(Text(f"  {visible(f'{mark}{finding}')}"), soft_wrap=True)


def draw_suggestion(out: Console, suggestion: Suggestion) -> None:
    """Print a suggested template, what it keeps, and how to read the rest."""
    users = plural(suggestion.users, "user")
    if suggestion.template is None or suggestion.config_patch is None:
        told = (
            f"No template fits: {suggestion.over:,} of {users} {_is(suggestion.over)} over the budget of "
            f"{suggestion.budget:,} bytes by what the present template carries besides metadata, which weighs up to "
            f"{suggestion.base_bytes:,}. Take some of it out of SESSION_CLAIMS."
        )
        out.print(Text(told, "red"))
        return
    fit = f"All {users} fit" if not suggestion.over else f"All but {suggestion.over:,} of {users} fit"
    out.print(
        f"{fit} the budget of {suggestion.budget:,} bytes under this template; the heaviest has {suggestion.max:,}."
    )
    out.print()
    for line in suggestion.template.splitlines():
        out.print(Text(visible(line)), soft_wrap=True)
    _heading(out, "To set it in Clerk; give SESSION_CLAIMS the same")
    out.print(Text(visible(suggestion.config_patch)), soft_wrap=True)
    _kept(out, suggestion)
    _moved(out, suggestion)


def _kept(out: Console, suggestion: Suggestion) -> None:
    if not suggestion.kept:
        return
    _heading(out, f"Kept in the token: {plural(len(suggestion.kept), 'field')}")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("field", no_wrap=True)
    for name in ("users", "largest"):
        table.add_column(name, justify="right", no_wrap=True)
    for field in suggestion.kept[:LISTED]:
        table.add_row(Text(cut(field.name)), f"{field.users:,}", f"{field.largest:,}")
    out.print(table)
    _more(out, len(suggestion.kept) - LISTED)
    for field in suggestion.kept:
        if not field.users:
            _warning(out, f"no user has {cut(field.name)}: is that its name?")


def _moved(out: Console, suggestion: Suggestion) -> None:
    moved = len(suggestion.moved) + suggestion.other_moved
    if moved:
        _heading(out, f"Read from Postgres: {plural(moved, 'field')}")
    for field in suggestion.moved[:LISTED]:
        out.print(Text.assemble(cut(field.name), (f"  {field.reason}", "dim")), soft_wrap=True)
        out.print(Text(f"    {visible(field.sql)}"), soft_wrap=True)
    _more(out, moved - LISTED)
    if suggestion.dropped:
        _heading(out, "Claims of the present template that it replaces")
        for name in suggestion.dropped:
            _item(out, Text(cut(name)))


def _more(out: Console, number: int) -> None:
    if number > 0:
        out.print(Text(f"and {number:,} more: see --json", "dim"))
