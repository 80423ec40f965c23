"""What the budget commands print and write: nothing here reaches a database."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from rich.table import Table

from worker.budget import Bar, Checked, Claims, Cookie, Field, Kind, Report
from worker.cli import main
from worker.cli.charts import blocks, cut, print_whole
from worker.cli.page import render
from worker.cli.summary import draw_checked, draw_report, draw_suggestion, keeps_all
from worker.jsontext import visible
from worker.suggest import Moved, Suggestion
from worker.words import percent

HOSTILE: Final = "unsafe_metadata.\u202e[red]\x1b[31m<script>alert(1)</script>\u200b\n\ufe0f\u3164"
SHOWN: Final = r"unsafe_metadata.\u202e[red]\u001b[31m<script>alert(1)</script>\u200b\n\ufe0f\u3164"
USERS_BY_BAR: Final = (812, 4210, 3120, 1980, 1012, 604, 301, 144, 81, 44, 12, 9, 6, 0, 3, 0, 2, 1, 0, 0, 4)


def cookie(median: int, largest: int) -> Cookie:
    return Cookie(898, 190, 4096, median, largest, largest + 190, 2398, ("the token is signed with RS256",))


SAMPLE: Final = Report(
    users=sum(USERS_BY_BAR),
    budget=1200,
    over=37,
    p50=292,
    p90=702,
    p99=1090,
    max=3402,
    stale=1234,
    inexact=12,
    histogram=tuple(
        Bar(120 * at + (at > 0), None if at == 20 else 120 * at + 120, users) for at, users in enumerate(USERS_BY_BAR)
    ),
    worst=(
        Claims("user_" + "2" * 27, 3402, True, "public_metadata.permissions"),
        Claims("user_" + "A" * 250, 1310, False, HOSTILE),
        Claims("user_3", 40, True, None),
    ),
    fields=(
        Field("public_metadata.permissions", 9120, 1_412_300, 2210, True, 0.412),
        Field(HOSTILE, 1, 900, 900, True, 0.0004),
        Field("public_metadata." + "日本語" * 20, 1, 900, 900, True, 0.0004),
        Field("public_metadata.biography", 30, 40_000, 1302, False, 0.0),
        *(Field(f"public_metadata.flag_{number}", 1, 4, 4, True, 0.0) for number in range(20)),
    ),
    other_fields=17,
    cookie=cookie(1288, 5434),
    assumed={"org.name": 40},
    template='{\n  "org": "{{org.name}}",\n  "public_metadata": "{{user.public_metadata}}"\n}',
    warnings=("line 3, column 22: don't trust it",),
)

NOBODY: Final = Report(
    users=0,
    budget=1200,
    over=0,
    p50=0,
    p90=0,
    p99=0,
    max=0,
    stale=0,
    inexact=0,
    histogram=tuple(replace(bar, users=0) for bar in SAMPLE.histogram),
    worst=(),
    fields=(),
    other_fields=0,
    cookie=cookie(898, 898),
    assumed={},
    template=None,
    warnings=(),
)


SUGGESTED: Final = Suggestion(
    template="{}",
    config_patch="clerk",
    users=9,
    budget=1200,
    over=0,
    max=900,
    base_bytes=2,
    kept=(),
    moved=(),
    other_moved=0,
    dropped=(),
    asked_for=(),
)


def bio(kind: str = "public", name: str = "bio") -> Moved:
    sql = f"select {kind}_metadata -> '{name}' from clerk.user_metadata where user_id = $1"  # noqa: S608 - shown
    return Moved(name=f"{kind}_metadata.{name}", reason="does not fit", users=3, largest=1961, sql=sql)


def drawn(report: Report, width: int = 80, missing: int = 0) -> list[str]:
    out = terminal(width)
    draw_report(out, report, missing)
    return printed(out)


def suggested(never: tuple[Kind, ...] = (), **changes: Any) -> list[str]:
    out = terminal()
    draw_suggestion(out, replace(SUGGESTED, **changes), never)
    return printed(out)


def terminal(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)


def printed(out: Console) -> list[str]:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue().splitlines()


def words(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


class _Page(HTMLParser):
    """Collects what a page is made of; fails where an element isn't closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# --- In the terminal


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_report_fits_the_terminal(width: int) -> None:
    lines = drawn(SAMPLE, width)
    assert max(Console().measure(line).maximum for line in lines if line) <= width


def test_the_budget_is_marked_between_the_bars() -> None:
    lines = drawn(SAMPLE)
    marked = next(at for at, line in enumerate(lines) if "1,200 budget" in line)
    assert lines[marked - 1].startswith("1,081 to 1,200")
    assert re.fullmatch(r"1,201 to 1,320 +▏ +12 +<0.1 %", lines[marked + 1])
    assert sum("█" in line and line.rstrip().endswith("%") and " to " in line for line in lines) >= 7


def test_a_report_says_who_is_over_and_what_to_do() -> None:
    told = words(drawn(SAMPLE))
    for part in (
        "12,345 users synced so far, 37 over the budget (0.3 %)",
        "292 702 1,090 3,402 bytes of claims",
        f"user_{'2' * 27} 3,402 public_metadata.permissions",
        "≤ 1,310",
        "Metadata fields, largest total first",
        "public_metadata.permissions 9,120 2,210 1,412,300 41.2 %",
        "public_metadata.biography 30 1,302 40,000 not carried",
        "and 26 more",
        "clerk-sync budget suggest",
        "1,234 users were last weighed by another template",
        "clerk-sync budget reweigh",
        "12 users are counted by an upper bound",
        """SESSION_CLAIMS_ASSUMED_BYTES='{"org.name": 40}'""",
        "5,434 over",
        "Warning: line 3, column 22",
    ):
        assert part in told


def test_users_weighed_by_other_settings_are_not_weighed_again_by_settings_that_no_worker_has() -> None:
    told = words(drawn(replace(SAMPLE, template=None)))
    assert "1,234 users were weighed by other settings than these: give SESSION_CLAIMS," in told
    assert "reweigh" not in told


def test_users_whose_metadata_only_clerk_has_are_told() -> None:
    note = "Of 12 users, metadata that is to be copied is still with Clerk alone: it comes with their next event."
    assert note in words(drawn(SAMPLE, missing=12))
    assert note in " ".join(_Page(render(SAMPLE, 12)).text.split())
    assert "Clerk alone" not in words(drawn(SAMPLE))


def test_in_a_narrow_terminal_figures_stand_one_a_line_and_no_name_gives_way_to_totals() -> None:
    lines = drawn(SAMPLE, 50)
    assert [line.split() for line in lines[4:8]] == [
        [name, size, "bytes", "of", "claims"]
        for name, size in (("p50", "292"), ("p90", "702"), ("p99", "1,090"), ("max", "3,402"))
    ]
    assert max(Console().measure(line).maximum for line in lines if line) <= 50
    assert "≤ 1,310" in words(lines)
    assert "1,412,300" not in words(lines)
    assert "public_metada" in words(lines)


def test_other_fields_are_explained_once_where_they_are_named() -> None:
    meant = "(other fields): beyond the 64 largest of a user, or with names over 64 bytes"
    worst = tuple(Claims(f"user_{number}", 1300, True, "public_metadata (other fields)") for number in range(3))
    assert words(drawn(replace(SAMPLE, worst=worst))).count(meant) == 1
    assert _Page(render(replace(SAMPLE, worst=worst))).text.count(meant) == 1
    out = terminal()
    draw_checked(out, Checked(3, 1200, 3, 0, 1300, worst), ())
    assert words(printed(out)).count(meant) == 1
    assert meant not in words(drawn(SAMPLE))


def test_only_bars_beyond_the_budget_are_red() -> None:
    out = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard", highlight=False)
    draw_report(out, SAMPLE)
    bars = [line for line in printed(out) if " to " in line and "\x1b[3" in line]
    assert [("\x1b[31m" in line) for line in bars] == [False] * 10 + [True] * 10


def test_without_colours_and_block_characters_the_picture_is_plain() -> None:
    raw = io.BytesIO()
    out = Console(file=io.TextIOWrapper(raw, "ascii", "backslashreplace"), width=80, highlight=False, markup=False)
    draw_report(out, SAMPLE)
    out.file.flush()
    text = raw.getvalue().decode()
    assert "-- 1,200 budget ---" in text
    assert "####" in text
    assert "<= 1,310" in text
    assert "\\u2588" not in text


def test_a_report_without_users_says_so() -> None:
    told = words(drawn(NOBODY))
    assert "No users yet" in told
    assert "SESSION_CLAIMS is not set" in told


@pytest.mark.parametrize("name", ["\x1b[2J", "\x07", "a\u202eb", "\u200b", "\u2066", "\ufe0f", "\u3164", "\U000e0041"])
def test_what_controls_or_hides_is_escaped_as_in_json(name: str) -> None:
    assert visible(name).isascii()
    assert visible(name).isprintable()
    assert json.loads(f'"{visible(name)}"') == name


def test_what_can_be_read_stays() -> None:
    for name in ("role", "größe", "日本語", "[red]", "a b"):
        assert visible(name) == name


def test_hostile_names_never_reach_the_terminal_raw() -> None:
    unwanted = Moved(name=HOSTILE, reason="not wanted", users=1, largest=9, sql=f"select '{HOSTILE}'")
    moved = (replace(unwanted, reason="can't be a dot path"), unwanted)
    suggestion = replace(SUGGESTED, kept=(SAMPLE.fields[1],), moved=moved, dropped=(HOSTILE,), asked_for=(HOSTILE,))
    out = terminal()
    draw_report(out, SAMPLE)
    draw_checked(out, Checked(2, 1200, 1, 1, 3402, SAMPLE.worst), ())
    draw_suggestion(out, suggestion)
    text = "\n".join(printed(out))
    assert r"\u202e[red]\u001b" in text
    assert not set("\u202e\x1b\u200b\ufe0f\u3164") & set(text)


def test_names_are_cut_by_the_cells_they_take() -> None:
    assert cut("a" * 40) == "a" * 40
    assert cut("a" * 41) == "a" * 39 + "…"
    assert Console().measure(cut("日" * 30)).maximum <= 40


def test_a_share_is_neither_none_nor_all_where_it_is_not() -> None:
    assert [percent(*pair) for pair in ((0, 9), (1, 9999), (1, 3), (9999, 10_000), (9, 9), (0, 0))] == [
        "0 %",
        "<0.1 %",
        "33.3 %",
        ">99.9 %",
        "100.0 %",
        "0 %",
    ]


def test_a_bar_shows_whatever_is_more_than_nothing() -> None:
    assert (blocks(0, 10), blocks(1e-9, 10), blocks(0.55, 10), blocks(9, 10)) == ("", "▏", "█████▌", "█" * 10)


def test_a_template_that_does_not_fit_is_told_with_who_is_to_blame() -> None:
    out = terminal()
    draw_checked(out, Checked(12_345, 1200, 30, 7, 3402, SAMPLE.worst), ())
    told = words(printed(out))
    assert "37 of 12,345 users synced so far would be over the budget of 1,200 bytes; the heaviest has 3,402." in told
    assert "7 of them are counted by an upper bound" in told
    assert "public_metadata.permissions" in told


def test_a_template_that_fits_is_told_in_a_sentence() -> None:
    out = terminal()
    draw_checked(out, Checked(12_345, 1200, 0, 0, 1100, SAMPLE.worst), ())
    assert words(printed(out)) == (
        "All 12,345 users synced so far fit the budget of 1,200 bytes under this template; the heaviest has 1,100."
    )


def test_a_suggestion_can_be_copied_as_it_is_printed() -> None:
    template = '{\n  "public_metadata": {\n    "r\u200b": "{{user.public_metadata.r\u200b}}"\n  }\n}'
    patch = "clerk config patch --json '" + '{"session":{"claims":{' + "x" * 200 + "}}}'"
    moved = bio()
    lines = suggested(template=template, config_patch=patch, kept=SAMPLE.fields[:1], moved=(moved,), other_moved=3)
    end = lines.index("}")
    assert json.loads("".join(lines[lines.index("{") : end + 1])) == json.loads(template)
    assert patch in lines
    assert f"    {moved.sql}" in lines
    assert "Read from Postgres: 4 fields" in lines
    assert lines.count("$1 is the user's id.") == 1
    assert "and 3 more: see --json" in lines


def test_a_field_that_no_user_has_is_told() -> None:
    nobody_s = Field("public_metadata.rool", 0, 0, 0, True, 0.0)
    assert "no user has public_metadata.rool" in words(suggested(kept=(nobody_s,)))


def test_what_was_asked_for_and_is_not_kept_is_told_first() -> None:
    moved = (
        bio(),
        replace(bio(name="it's"), reason="can't be a dot path"),
        replace(bio(name="rool"), users=0, largest=0),
    )
    asked_for = tuple(field.name for field in moved)
    assert not keeps_all(replace(SUGGESTED, moved=moved, asked_for=asked_for))
    told = words(suggested(moved=moved, asked_for=asked_for))
    assert told.startswith(
        "public_metadata.bio doesn't fit: its largest value has 1,961 bytes; --percentile lets some users be over. "
        "public_metadata.it's isn't kept: can't be a dot path. "
        "public_metadata.rool doesn't fit, and no user has it: is that its name? "
        "All 9 users synced so far fit the budget of 1,200 bytes"
    )


def test_a_suggestion_with_all_that_was_asked_for_keeps_all() -> None:
    kept = SAMPLE.fields[:1]
    assert keeps_all(replace(SUGGESTED, kept=kept, asked_for=(kept[0].name,)))
    assert keeps_all(replace(SUGGESTED, moved=(bio(),)))
    assert not keeps_all(replace(SUGGESTED, template=None, config_patch=None))


def test_of_fields_that_nobody_asked_for_one_stands_for_all() -> None:
    unwanted = tuple(replace(bio(name=f"f{number}"), reason="not wanted") for number in range(40))
    lines = suggested(kept=SAMPLE.fields[:1], moved=unwanted, other_moved=60, asked_for=(SAMPLE.fields[0].name,))
    assert "100 fields not asked for with --keep, such as public_metadata.f0:" in lines
    assert [line for line in lines if "select" in line] == [f"    {unwanted[0].sql}"]


def test_fields_of_a_kind_that_is_never_copied_are_warned_about() -> None:
    told = words(suggested(("unsafe_metadata",), moved=(bio("unsafe"),)))
    assert "with COPY_UNSAFE=never, unsafe_metadata is always null in Postgres" in told
    assert "Warning" not in words(suggested(("unsafe_metadata",), moved=(bio("public"),)))


def test_without_users_nothing_is_suggested() -> None:
    assert suggested(template=None, config_patch=None, users=0) == ["No users yet: nothing to suggest from."]


def test_a_base_that_is_over_is_told_with_its_weight() -> None:
    told = words(suggested(template=None, config_patch=None, budget=100, over=3, max=140, base_bytes=140))
    assert "3 of 9 users synced so far are over the budget of 100 bytes" in told


# --- As a page


@pytest.mark.parametrize("report", [SAMPLE, NOBODY])
def test_the_page_is_whole_and_asks_for_nothing_else(report: Report) -> None:
    text = render(report)
    page = _Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|url\(|@import", text)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in page.attributes
    assert ("lang", "en") in page.attributes
    assert "prefers-color-scheme: dark" in text


def test_the_page_has_the_numbers() -> None:
    page = _Page(render(SAMPLE))
    told = " ".join(page.text.split())
    for part in (
        "12,345",
        "budget, 1,200",
        "1,201 to 1,320 bytes: 12 users, <0.1 %",
        f"user_{'A' * 250}",
        "1,412,300",
        "and 17 fields more",
        "2,398 bytes of claims just fit",
        "clerk-sync budget reweigh",
        """SESSION_CLAIMS_ASSUMED_BYTES='{"org.name": 40}'""",
        '"org": "{{org.name}}"',
        "Made by clerk-sync",
    ):
        assert part in told
    assert {"title", "desc", "table", "th", "time"} <= page.tags


def test_the_page_without_users_says_so() -> None:
    assert "No users yet" in _Page(render(NOBODY)).text


def test_hostile_names_are_text_on_the_page() -> None:
    text = render(SAMPLE)
    assert SHOWN in _Page(text).text.replace("\n", "")
    assert "<script" not in text
    assert not set("\u202e\x1b\u200b\ufe0f\u3164") & set(text)


# --- The commands


def run(*arguments: str, text: str | None = None, **settings: str | None) -> Result:
    """A command that can't reach a database: nobody listens on port 1."""
    env = {
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        "DATABASE_URL_FILE": None,
        "SESSION_CLAIMS": None,
        "SESSION_CLAIMS_BUDGET": None,
        "SESSION_CLAIMS_ASSUMED_BYTES": None,
        **settings,
    }
    return CliRunner().invoke(main, ["budget", *arguments], input=text, env=env)


BAD: Final = {
    "line 1, column 2": "{role: 1}",
    "line 2, column 12": '{\n  "role": "{{user.pubic_metadata.role}}"}',
    "line 1, column 11": '{"plan": "{{user.private_metadata.plan}}"}',
    "line 1, column 15": '{"role": "x", "sub": "y"}',
}


@pytest.mark.parametrize(("position", "template"), BAD.items())
def test_a_wrong_template_is_refused_with_its_position_before_any_connection(position: str, template: str) -> None:
    ran = run("check", template)
    assert (ran.exit_code, ran.stdout) == (2, "")
    assert re.search(r"line \d+, column \d+: \w", ran.stderr)
    assert position.split(",", maxsplit=1)[0] in ran.stderr


def test_every_error_of_a_template_is_told() -> None:
    ran = run("check", '{"sub": 1, "a": "{{user.private_metadata}}"}')
    assert ran.exit_code == 2
    assert "2 errors" in ran.stderr
    assert ran.stderr.count("column") == 2


def test_a_wrong_template_is_told_to_a_program_as_json() -> None:
    ran = run("check", "--json", '{"sub": 1}')
    assert ran.exit_code == 2
    (error,) = json.loads(ran.stdout)["findings"]
    assert (error["severity"], error["line"], error["column"]) == ("error", 1, 2)


def test_a_template_is_taken_from_a_file_and_from_standard_input(tmp_path: Path) -> None:
    path = tmp_path / "claims.json"
    path.write_text('\ufeff{\n "sub": 1}', encoding="utf-8")
    for ran in (run("check", str(path)), run("check", f"@{path}"), run("check", "-", text='{\n "sub": 1}')):
        assert ran.exit_code == 2
        assert "line 2, column 2" in ran.stderr


@pytest.mark.parametrize("template", ['[{"role": 1}]', ' "role"', "[", "{"])
def test_what_begins_like_json_is_read_as_a_template(template: str) -> None:
    ran = run("check", template)
    assert ran.exit_code == 2
    assert "line 1, column" in ran.stderr


def test_an_empty_template_is_told_as_such() -> None:
    for template in ("", " \n"):
        ran = run("check", template)
        assert ran.exit_code == 2
        assert "TEMPLATE is empty" in ran.stderr


def test_a_shortcode_whose_bytes_are_given_is_known() -> None:
    template = '{"tier": "{{org.tier}}"}'
    assert "line 1, column" in run("check", template).stderr
    ran = run("check", template, SESSION_CLAIMS_ASSUMED_BYTES='{"org.tier": 30}')
    assert ran.stderr.startswith("clerk-sync: Postgres doesn't answer")


def test_a_wrong_template_is_told_where_no_database_is_named() -> None:
    wrong, right = (run("check", template, DATABASE_URL=None) for template in ('{"sub": 1}', "{}"))
    assert (wrong.exit_code, right.exit_code) == (2, 2)
    assert "line 1, column 2" in wrong.stderr
    assert "DATABASE_URL is missing" in right.stderr


class _Interrupted(io.RawIOBase):
    """Standard input at which somebody presses Ctrl-C."""

    def readable(self) -> bool:
        return True

    def readinto(self, _: object) -> int:
        raise KeyboardInterrupt


def test_ctrl_c_ends_a_command_in_one_line() -> None:
    ran = CliRunner().invoke(main, ["budget", "check", "-"], input=io.BufferedReader(_Interrupted()))
    assert (ran.exit_code, ran.stdout, ran.stderr) == (130, "", "Stopped.\n")


@pytest.mark.parametrize("template", ["nothing-there.json", "@nothing-there.json", "x" * 5000])
def test_what_is_neither_json_nor_a_file_is_refused_with_both_possibilities(template: str) -> None:
    ran = run("check", template)
    assert ran.exit_code == 2
    told = " ".join(ran.stderr.split())
    assert "JSON" in told
    assert "@FILE" in told
    assert len(told) < 600


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("suggest", "--keep", "role"), "public_metadata.NAME"),
        (("suggest", "--keep", "public_metadata.a, private_metadata.b"), "private_metadata.b"),
        (("suggest", "--keep", "public_metadata"), "public_metadata.NAME"),
        (("suggest", "--keep", "public_metadata..role"), "public_metadata.NAME"),
        (("suggest", "--keep", "user.public_metadata.profile.bio"), "be suggested: public_metadata.profile"),
        (("suggest", "--percentile", "0"), "--percentile"),
        (("suggest", "--percentile", "nan"), "--percentile"),
        (("suggest", "--percentile", "100.1"), "--percentile"),
        (("report", "--html", "/no/such/folder/report.html"), "/no/such/folder"),
    ],
)
def test_wrong_usage_is_refused_before_any_connection(arguments: tuple[str, ...], told: str) -> None:
    ran = run(*arguments)
    assert ran.exit_code == 2
    assert told in ran.stderr


@pytest.mark.parametrize("arguments", [("report",), ("check", "{}"), ("suggest",), ("reweigh",)])
def test_a_database_that_is_away_is_told_in_one_line(arguments: tuple[str, ...]) -> None:
    ran = run(*arguments)
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert ran.stderr.startswith("clerk-sync: Postgres doesn't answer")


@pytest.mark.parametrize("command", ["report", "check", "suggest", "reweigh"])
def test_help_teaches_by_an_example(command: str) -> None:
    ran = run(command, "--help")
    assert ran.exit_code == 0
    assert f"clerk-sync budget {command}" in ran.stdout


def test_a_table_of_ids_is_never_cut_however_narrow_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    cells = (f"user_{'a' * 27}", "unusable: " + "why and what to do " * 10)
    table = Table(box=None, show_header=False)
    for _ in cells:
        table.add_column(no_wrap=True)
    table.add_row(*cells)
    print_whole(table)
    assert capsys.readouterr().out.split(maxsplit=1) == [cells[0], f"{cells[1]} \n"]
