"""What the status page tells: how it stands, asked of Postgres, and what that means for whoever looks."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, Literal, NamedTuple

import psycopg

from worker import inbox, minutes, roles, runs, users
from worker.db import Connection, deadline, describe
from worker.minutes import MINUTE, Minute
from worker.runs import Overview as Runs
from worker.words import age, duration, plural

log = logging.getLogger(__name__)

LIMIT_SECONDS: Final = 3.0

DEAD_SHOWN: Final = 20
OVER_SHOWN: Final = 10

DAY: Final = timedelta(days=1)
RECENT: Final = timedelta(minutes=10)

BEHIND_SECONDS: Final = 10.0
"""What is pending is found and applied within so much, even without a broker."""
STALE_SECONDS: Final = 60.0

SEEN: Final = timedelta(seconds=150)
"""Workers count each minute soon after it is over: after so long without one, there is none."""

QUIET: Final = timedelta(minutes=30)


@dataclass(slots=True)
class Overview:
    """How it stands; None is what couldn't be asked. `at` is the database's clock, `newest` the last minute that a
    worker counted."""

    at: datetime | None = None
    problems: list[str] = field(default_factory=list)
    counts: dict[str, Any] | None = None
    newest: Minute | None = None
    minutes: list[Minute] | None = None
    runs: list[Runs] | None = None
    calls: int | None = None
    dead: list[inbox.Dead] | None = None
    over: list[users.Heavy] | None = None
    spread: users.Spread | None = None
    failed: bool = False

    @property
    def silent(self) -> bool:
        """Whether Postgres told nothing at all."""
        return self.at is None


NOW = """
select now()
"""


def look(connect: Callable[[], Connection], budget: int, length: timedelta) -> Overview:
    """Ask for all of it, minutes as far back as `length`, within a few seconds: what matters most comes first, and what
    can't be asked in that time is left out."""
    found = Overview()
    try:
        with connect() as connection, deadline(connection, LIMIT_SECONDS):
            ((found.at,),) = connection.execute(NOW).fetchall()
            found.problems = roles.problems(connection, roles.RECEIVER)
            found.counts = inbox.counts(connection)
            found.newest = minutes.newest(connection)
            found.minutes = minutes.since(connection, length)
            found.dead = inbox.set_aside_last(connection, DEAD_SHOWN)
            found.runs = runs.overview(connection)
            found.calls = runs.calls(connection, DAY)
            found.over = users.over_budget(connection, OVER_SHOWN)
            found.spread = users.spread(connection, 2 * budget + 1)
    except psycopg.Error as error:
        found.failed = True
        log.warning("the status page lacks what Postgres didn't tell", extra={"error": describe(error)})
    return found


Level = Literal["good", "warn", "bad"]


class Advice(NamedTuple):
    """What is wrong or will be, and a command that does something about it."""

    text: str
    command: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the data is fresh: in a word, in a sentence, and what to do."""

    level: Level
    word: str
    sentence: str
    advice: list[Advice]


SILENT: Final = Verdict(
    "bad",
    "Postgres doesn't answer",
    "Nothing can be told. Deliveries are answered 503, and Svix sends them again for 27 h 35 min.",
    [Advice("Bring Postgres back. The receiver's log tells the reason; nothing has to be done here afterwards.")],
)


def verdict(found: Overview) -> Verdict:
    """Judge what was found."""
    if found.silent:
        return SILENT
    advice = [Advice(problem) for problem in found.problems]
    if found.counts is None:
        return Verdict("bad", "Not ready", "The tables can't be read.", advice or [Advice(UNREADABLE)])
    level, word, sentence = _freshness(found, found.counts)
    if found.problems:
        level, word = "bad", "Not ready"
    return Verdict(level, word, sentence, [*advice, *_advice(found, found.counts)])


UNREADABLE: Final = "Postgres didn't tell in time: the receiver's log says more."


def _freshness(found: Overview, counts: dict[str, Any]) -> tuple[Level, str, str]:
    pending, oldest = counts["pending"], counts["oldest_pending_seconds"]
    waiting = f"{plural(pending, 'event')} {'waits' if pending == 1 else 'wait'}, the oldest for {duration(oldest)}."
    if worker_seen(found) is False:
        gone = f"No worker has been seen {_unseen(found)}"
        if pending:
            return "bad", "Not fresh", f"{gone}. {waiting}"
        return "warn", "No worker", f"{gone}. Nothing waits so far."
    if oldest > BEHIND_SECONDS:
        return ("bad", "Not fresh", waiting) if oldest > STALE_SECONDS else ("warn", "Behind", waiting)
    return "good", "Fresh", f"{waiting if pending else 'Nothing waits to be applied.'} {_lately(found)}"


def worker_seen(found: Overview) -> bool | None:
    """Whether a worker counted one of the last minutes; None where that couldn't be asked."""
    if found.minutes is None or found.at is None:
        return None
    return found.newest is not None and found.at - found.newest.minute - MINUTE < SEEN


def _unseen(found: Overview) -> str:
    if found.newest is None or found.at is None:
        return "yet"
    return f"for {age(found.at - found.newest.minute - MINUTE)}"


def recent(found: Overview) -> Minute | None:
    """The last ten minutes as one; None where no worker counted any."""
    last = [one for one in found.minutes or () if found.at and found.at - one.minute <= RECENT + MINUTE]
    return minutes.put_together(last) if last else None


def _lately(found: Overview) -> str:
    lately = recent(found)
    if lately is None or lately.fresh_p50 is None or lately.fresh_p99 is None:
        return "In the last ten minutes nothing was."
    return (
        f"Of the last ten minutes' {plural(lately.applied, 'event')}, half were visible within "
        f"{duration(lately.fresh_p50)} of being sent, 99 % within {duration(lately.fresh_p99)}."
    )


def _advice(found: Overview, counts: dict[str, Any]) -> list[Advice]:
    """What to do, the gravest first."""
    advice = []
    oldest = counts["oldest_pending_seconds"]
    if worker_seen(found) is False:
        advice.append(Advice("Start a worker. If one runs, the last lines of its log say why it does nothing."))
    elif oldest > BEHIND_SECONDS:
        advice.append(
            Advice(
                "Look at the workers' log. With lines of “batch applied”, they work off a backlog; else it says what "
                "they wait for. Then look at locks in Postgres."
            )
        )
    for one in found.runs or ():
        if one.failed:
            again = "backfill" if one.last.kind == runs.BACKFILL else "reconcile"
            advice.append(Advice(f"The last run ({one.last.kind}) {why(one)}. To try again:", f"clerk-sync {again}"))
    if not _delivered(found) and any(one.last.kind == runs.INCREMENTAL and one.last.found for one in found.runs or ()):
        advice.append(
            Advice(
                f"Users change at Clerk, and no event has come for {age(QUIET)}: see in Clerk's Dashboard whether the "
                "endpoint is enabled, and leads here."
            )
        )
    if counts["dead"]:
        told = f"{plural(counts['dead'], 'event')} {'was' if counts['dead'] == 1 else 'were'} set aside"
        advice.append(Advice(f"{told}: see the reasons below, mend what refused them, and retry."))
    if counts["users_content_missing"]:
        missing = plural(counts["users_content_missing"], "user")
        advice.append(
            Advice(f"Of {missing}, metadata that is to be copied is with Clerk alone:", "clerk-sync refresh --missing")
        )
    if found.failed:
        advice.append(Advice("Postgres didn't tell everything in time: what is missing below is not known."))
    return advice


def why(one: Runs) -> str:
    """Why a run came to no end."""
    return f"failed: {one.last.error}" if one.state == "failed" else "was cut short: its process or connection ended"


def _delivered(found: Overview) -> bool:
    """Whether events came of late, or that isn't known."""
    counted = [one for one in found.minutes or () if found.at and found.at - one.minute <= QUIET + MINUTE]
    return len(counted) < QUIET // MINUTE or any(one.acknowledged for one in counted)
