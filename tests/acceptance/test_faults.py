"""The short form of `make faults` and `make soak`: a few of the faults, on one cluster of two hosts."""

from __future__ import annotations

import itertools
import random
import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import Final

import pytest

from tests.faults import soak
from tests.faults.kinds import KINDS
from tests.faults.lane import Lane, bad
from worker import local

SHORT: Final = (
    "receiver killed",
    "receiver: a child killed",
    "worker killed",
    "beat killed",
    "Redis killed",
    "Redis wiped",
    "Redis: forged messages",
    "Postgres killed",
    "Postgres half-open: old connections silent, new ones work",
    "Postgres commits, and the answer is lost",
    "Postgres read-only, as after a failover",
    "a long lock on clerk.users",
)
"""Kills of everything, and such as have broken something before."""


@pytest.fixture(scope="module")
def lane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lane]:
    """A cluster under load, compared as a whole at the end."""
    folder = tmp_path_factory.mktemp("faults")
    folder.chmod(0o711)  # the account that Postgres runs as has to pass
    lane = Lane(folder / "system", "short")
    try:
        with lane.running():
            yield lane
            final = lane.final()
        assert not bad(final), final
        assert not lane.unexpected()
    finally:
        local.discard(folder / "system" / "servers")


numbers: Final = itertools.count()


@pytest.mark.parametrize("kind", SHORT)
def test_nothing_is_lost_nor_wrong_nor_stuck_after(lane: Lane, kind: str) -> None:
    number = next(numbers)
    outcome = lane.inject(KINDS[kind], number, random.Random(number))
    assert not bad(outcome), outcome
    assert outcome.acknowledged


def test_soak_sees_every_measure_and_tells_growth_from_level(lane: Lane) -> None:
    series: soak.Series = defaultdict(list)
    over = threading.Event()
    over.set()
    soak.take_samples(lane, series, over)
    assert {measure.name for measure in soak.MEASURES} == set(series)
    assert all(value > 0 for (value,) in series.values())
    level = {measure.name: [100.0] * 40 for measure in soak.MEASURES}
    assert soak.grown(level) == []
    assert soak.grown(level | {soak.WORKERS: [100.0 + 5 * place for place in range(40)]}) == [soak.WORKERS]
