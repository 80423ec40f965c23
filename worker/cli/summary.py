"""The session-token budget in words and tables: a report, a template that was checked, one that is suggested."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable
from typing import Final, NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker.budget import KINDS, Checked, Claims, Cookie, Field, Kind, Report
from worker.claims import FIELDS_KEPT, NAME_BYTES
from worker.cli.charts import NAME_CELLS, WIDEST, ascii_only, blocks, cut, histogram, worst
from worker.jsontext import visible
from worker.suggest import Moved, Suggestion
from worker.template import Finding
from worker.words import percent, plural

LISTED: Final = 15
"""How many fields are shown; JSON and the page have all."""

NARROW: Final = 60
"""Below so many columns figures stand one a line."""

NAMES_LEAST: Final = 24
"""Where names would have fewer cells, a table of fields goes without the totals."""


class Note(NamedTuple):
    """What the reader of a report should know, and the command that does something about it."""

    text: str
    command: str | None = None


def notes(report: Report, missing: int) -> list[Note]:
    """What follows from a report, the gravest first. Of `missing` users, metadata to be copied is with Clerk alone."""
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
        found.append(_stale(report))
    if missing:
        found.append(
            Note(
                f"Of {plural(missing, 'user')}, metadata that is to be copied is still with Clerk alone: it comes with "
                "their next event."
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


def _stale(report: Report) -> Note:
    told = f"{plural(report.stale, 'user')} {_was(report.stale)}"
    if report.template is None:
        # Whoever reweighed now would most likely do it by settings that no worker has.
        return Note(
            f"{told} weighed by other settings than these: give SESSION_CLAIMS, SESSION_CLAIMS_BUDGET and COPY_ what "
            "the workers have."
        )
    return Note(
        f"{told} last weighed by another template, budget or COPY_ setting; the figures here are measured anew. To "
        "weigh and decide again what is copied:",
        "clerk-sync budget reweigh",
    )


def others(users: Iterable[Claims]) -> str | None:
    """What `(other fields)` means, where one of these users is told to have most of it."""
    if not {user.blame for user in users} & {f"{kind} (other fields)" for kind in KINDS}:
        return None
    return f"(other fields): beyond the {FIELDS_KEPT} largest of a user, or with names over {NAME_BYTES} bytes"


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _was(number: int) -> str:
    return "was" if number == 1 else "were"


def assumed_setting(report: Report) -> str:
    """The environment variable that sets an assumed size, with one of the report's as the example."""
    name, size = next(iter(report.assumed.items()))
    return f"SESSION_CLAIMS_ASSUMED_BYTES={shlex.quote(json.dumps({name: size}))}"


def draw_report(out: Console, report: Report, missing: int = 0) -> None:
    """Print a report; `missing` is as in `notes`."""
    out.print(Text.assemble(("Session-token budget", "bold"), f": {report.budget:,} bytes of custom claims"))
    if report.users:
        _summary(out, report)
        _heading(out, "Users by the bytes of their claims")
        for line in histogram(report.histogram, report.budget, min(out.width, WIDEST), plain=ascii_only(out)):
            out.print(line, no_wrap=True)
        _heading(out, "The heaviest users")
        _worst(out, report.worst, report.budget)
        _fields(out, report)
        _cookie(out, report.cookie)
    else:
        out.print("No users yet: nothing to weigh.")
    _assumed(out, report)
    found = notes(report, missing)
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
    out.print(Text.assemble(plural(report.users, "user"), " synced so far, ", over))
    out.print()
    figures = {"p50": report.p50, "p90": report.p90, "p99": report.p99, "max": report.max}
    cells = [Text(f"{size:,}", "red" if size > report.budget else "", justify="right") for size in figures.values()]
    if out.width < NARROW:
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, cell in zip(figures, cells, strict=True):
            table.add_row(Text(name, "dim"), cell, Text("bytes of claims", "dim"))
    else:
        table = Table(box=None, pad_edge=False, padding=(0, 4, 0, 0))
        for name in figures:
            table.add_column(name, justify="right", header_style="dim", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_row(*cells, Text("bytes of claims", "dim"))
    out.print(table)


def _worst(out: Console, users: tuple[Claims, ...], budget: int) -> None:
    out.print(worst(users, budget, out.width, plain=ascii_only(out)))
    if told := others(users):
        out.print(Text(told, "dim"))


def _fields(out: Console, report: Report) -> None:
    if not report.fields:
        return
    _heading(out, "Metadata fields, largest total first")
    listed = report.fields[:LISTED]
    columns = {
        "users": [Text(f"{field.users:,}") for field in listed],
        "largest": [Text(f"{field.largest:,}") for field in listed],
        "total": [Text(f"{field.total:,}") for field in listed],
        "of all claims": [_share(field) for field in listed],
    }
    if _room(out, columns) < NAMES_LEAST:
        del columns["total"]
    room = max(12, min(NAME_CELLS, _room(out, columns)))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("field", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for field, *cells in zip(listed, *columns.values(), strict=True):
        table.add_row(Text(cut(field.name, room)), *cells)
    out.print(table)
    more = len(report.fields) - LISTED + report.other_fields
    if more > 0:
        out.print(Text(f"and {more:,} more: see --json or --html", "dim"))


def _room(out: Console, columns: dict[str, list[Text]]) -> int:
    """The cells that such columns leave for names."""
    return out.width - sum(2 + max(map(cell_len, (name, *map(str, cells)))) for name, cells in columns.items())


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
        out.print(f"{_all_fit(checked.users)} {budget} under this template; the heaviest has {checked.max:,}.")
    else:
        _over(out, checked, users, budget)
        _heading(out, "The heaviest users under this template")
        _worst(out, checked.worst, checked.budget)
    if warnings:
        out.print()
    for warning in warnings:
        _warning(out, str(warning))


def _all_fit(users: int) -> str:
    return "The one user synced so far fits" if users == 1 else f"All {users:,} users synced so far fit"


def _over(out: Console, checked: Checked, users: str, budget: str) -> None:
    over = checked.over + checked.over_bounds
    told = f"{over:,} of {users} synced so far would be over {budget}; the heaviest has {checked.max:,}."
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


def draw_suggestion(out: Console, suggestion: Suggestion, never: Collection[Kind] = ()) -> None:
    """Print a suggested template, what it keeps, and how to read the rest; `never` are the kinds that no setting
    copies."""
    if not suggestion.users:
        out.print("No users yet: nothing to suggest from.")
        return
    users = f"{plural(suggestion.users, 'user')} synced so far"
    if suggestion.template is None or suggestion.config_patch is None:
        told = (
            f"No template fits: {suggestion.over:,} of {users} {_is(suggestion.over)} over the budget of "
            f"{suggestion.budget:,} bytes by what the present template carries besides metadata, which weighs up to "
            f"{suggestion.base_bytes:,}. Take some of it out of SESSION_CLAIMS."
        )
        out.print(Text(told, "red"))
        return
    _refused(out, suggestion)
    fit = f"All but {suggestion.over:,} of {users} fit" if suggestion.over else _all_fit(suggestion.users)
    out.print(
        f"{fit} the budget of {suggestion.budget:,} bytes under this template; the heaviest has {suggestion.max:,}."
    )
    out.print()
    for line in suggestion.template.splitlines():
        out.print(Text(visible(line)), soft_wrap=True)
    _heading(out, "To set it in Clerk; give SESSION_CLAIMS the same")
    out.print(Text(visible(suggestion.config_patch)), soft_wrap=True)
    _kept(out, suggestion)
    _moved(out, suggestion, never)


def keeps_all(suggestion: Suggestion) -> bool:
    """Whether there is a template, with every field that was asked for."""
    return suggestion.template is not None and {field.name for field in suggestion.kept}.issuperset(
        suggestion.asked_for
    )


def _refused(out: Console, suggestion: Suggestion) -> None:
    """What was asked for and isn't in the template: nobody should have to look for it."""
    if keeps_all(suggestion):
        return
    asked_for = set(suggestion.asked_for)
    refused = [field for field in suggestion.moved if field.name in asked_for]
    for field in refused[:LISTED]:
        out.print(Text(f"{cut(field.name)} {_refusal(field)}", "red"))
    _more(out, len(refused) - LISTED)
    out.print()


def _refusal(field: Moved) -> str:
    if field.reason != "does not fit":
        return f"isn't kept: {field.reason}."
    if not field.users:
        return "doesn't fit, and no user has it: is that its name?"
    return f"doesn't fit: its largest value has {field.largest:,} bytes; --percentile lets some users be over."


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


def _moved(out: Console, suggestion: Suggestion, never: Collection[Kind]) -> None:
    total = len(suggestion.moved) + suggestion.other_moved
    if total:
        _heading(out, f"Read from Postgres: {plural(total, 'field')}")
        out.print(Text("$1 is the user's id.", "dim"))
    alike = [field for field in suggestion.moved if field.reason == "not wanted"]
    told = [field for field in suggestion.moved if field.reason != "not wanted"]
    # With a choice of fields, those that were asked for are listed first: the rest were not.
    unlisted = 0 if suggestion.asked_for else suggestion.other_moved
    for field in told[:LISTED]:
        out.print(Text.assemble(cut(field.name), (f"  {field.reason}", "dim")), soft_wrap=True)
        _query(out, field)
    _more(out, len(told[LISTED:]) + unlisted)
    if alike:
        number = total - len(told) - unlisted
        out.print(Text(f"{plural(number, 'field')} not asked for with --keep, such as {cut(alike[0].name)}:"))
        _query(out, alike[0])
    _never_copied(out, suggestion, never)
    if suggestion.dropped:
        _heading(out, "Claims of the present template that it replaces")
        for name in suggestion.dropped:
            _item(out, Text(cut(name)))


def _query(out: Console, field: Moved) -> None:
    # Escaped as JSON is, SQL would ask for another field.
    shown = field.sql if visible(field.sql) == field.sql else "see --json"
    out.print(Text(f"    {shown}"), soft_wrap=True)


def _never_copied(out: Console, suggestion: Suggestion, never: Collection[Kind]) -> None:
    for kind in never:
        if any(field.name.startswith(f"{kind}.") for field in suggestion.moved):
            setting = f"COPY_{kind.removesuffix('_metadata').upper()}"
            _warning(
                out,
                f"with {setting}=never, {kind} is always null in Postgres, whatever is asked of it. For the fields "
                f"above, {setting} must be oversize or always.",
            )


def _more(out: Console, number: int) -> None:
    if number > 0:
        out.print(Text(f"and {number:,} more: see --json", "dim"))
