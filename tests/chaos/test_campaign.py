"""A short campaign: three faults that no other test throws, and the counting itself."""

import random
import time
from pathlib import Path

import pytest

from tests.chaos.__main__ import summary
from tests.chaos.campaign import Outcome, campaign, chosen
from tests.chaos.faults import FAULTS
from tests.chaos.field import field_of

pytestmark = pytest.mark.servers
SHORT = ("frozen past the lease", "worker and API killed", "Redis lost its data")


def test_a_short_campaign_loses_nothing(tmp_path: Path) -> None:
    with field_of(tmp_path) as field:
        undisturbed = field.artifact(field.ended(field.submit()))
        faults = [fault for fault in FAULTS if fault.name in SHORT]
        outcomes = list(campaign(field, undisturbed, faults, random.Random(3), time.monotonic() + 600))
    assert [outcome.fault for outcome in outcomes] == [fault.name for fault in faults]
    assert [outcome.verdict for outcome in outcomes] == ["recovered"] * len(SHORT), outcomes


def test_every_kind_comes_before_any_comes_twice() -> None:
    names = [fault.name for fault in chosen(20, "sqlite", random.Random(1))]
    kinds = {fault.name for fault in FAULTS if fault.shape is None}
    assert set(names[: len(kinds)]) == kinds
    assert names != [fault.name for fault in chosen(20, "sqlite", random.Random(2))]
    assert {fault.name for fault in chosen(14, "postgresql", random.Random(1))} == kinds | {"database connections cut"}


def test_the_last_line_counts() -> None:
    def outcome(verdict: str, seconds: float) -> Outcome:
        return Outcome("a fault", "a moment", verdict, "failed", 1, seconds)

    outcomes = [outcome("recovered", 1.5), outcome("stuck", 150.0), outcome("wrong", 2.0)]
    said = "CHAOS faults=3 recovered=1 wrong=1 lost=0 stuck=1 worst_recovery_seconds=150.00"
    assert summary(outcomes) == said
