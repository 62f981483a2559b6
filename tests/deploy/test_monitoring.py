"""Each metric that the alert rules and the dashboard name is one that our processes export."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from api_schemas.jobs import JobRequest
from job_store.block_times import BlockTimes
from job_store.database import writing
from job_store.jobs import JobStore
from job_store.settings import Settings
from job_store.tables import JobRow
from job_store.workers import WorkerStore
from service.metrics import Metrics
from tests.workers.conftest import RECIPE
from workers.inference.metrics import Metrics as InferenceMetrics
from workers.vital_signs import VitalSigns
from workers.workplace import Workplace, open_workplace

DOCKER = Path(__file__).parents[2] / "docker"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",), "summary": ("",)}
# what stands in an expression and is no metric: functions, words, label names in braces are cut out before
WORDS = {
    "and",
    "or",
    "unless",
    "by",
    "sum",
    "rate",
    "increase",
    "histogram_quantile",
    "le",
    "status",
    "route",
    "model_name",
}
NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


def expressions() -> Iterator[str]:
    rules: dict[str, Any] = yaml.safe_load((DOCKER / "alerts.yml").read_text(encoding="utf-8"))
    for group in rules["groups"]:
        for rule in group["rules"]:
            assert {"alert", "expr", "labels", "annotations"} <= rule.keys()
            assert {"summary", "remedy"} == rule["annotations"].keys()
            yield rule["expr"]
    board = json.loads((DOCKER / "grafana-dashboard.json").read_text(encoding="utf-8"))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"]) > 10
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield target["expr"]


def named_in(expression: str) -> set[str]:
    plain = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", expression)
    return {name for name in NAME.findall(plain) if name not in WORDS}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workplace]:
    place = open_workplace(Settings(home=tmp_path / "home", peak_flops=1e12))
    yield place
    place.engine.dispose()


@pytest.fixture
def text(place: Workplace) -> str:
    """Metrics of an API whose one job runs, on one worker that is a straggler."""
    job, _ = JobStore(place.engine).create(
        JobRequest.model_validate({"model": "tiny", "recipe": RECIPE}), recipe_hash="0" * 64
    )
    claim = place.leases.claim(job.id, "worker", 90.0)
    assert claim is not None
    beat = VitalSigns(place, claim, 1, place.layout.home / "no log").heartbeat()
    measured = {"at": time.time() - 50, "tokens_per_second": 1000.0, "flops_per_second": 5e11, "mfu": 0.5}
    place.leases.beat(job.id, claim.fence, beat.model_copy(update=measured), said=None)
    worker = WorkerStore(place.engine).add("w", "class", "ready", [], 0.0)
    for seconds in [1.0] * 20 + [2.0] * 3:
        BlockTimes(place.engine).judge("modegpt a, sizes", seconds, job_id=job.id, block=0, worker_id=worker)
    return Metrics(place.engine, place.settings).text().decode()


def names(text: str) -> set[str]:
    return {family.name + suffix for family in text_string_to_metric_families(text) for suffix in SUFFIXES[family.type]}


def test_what_alerts_and_dashboard_name_is_exported(text: str) -> None:
    exported = names(text) | names(generate_latest(InferenceMetrics().registry).decode())
    asked = set().union(*map(named_in, expressions()))
    assert len(asked) > 15
    assert asked - exported == set()
    assert named_in('sum(rate(no_such_metric{a="b"}[5m])) / x_total') == {"no_such_metric", "x_total"}


def test_jobs_and_workers_in_numbers(place: Workplace, text: str) -> None:
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found["modepress_jobs", "running"] == found["modepress_attempts_total",] == found["modepress_attempt",] == 1
    assert 0 <= found["modepress_lease_age_seconds",] < 45
    assert 50 <= found["modepress_heartbeat_age_seconds",] < 95
    assert (found["modepress_tokens_per_second",], found["modepress_mfu",]) == (1000.0, 0.5)
    assert (found["modepress_block_seconds", "modegpt a", "0.5"], found["modepress_slow_blocks",]) == (1.0, 3.0)
    assert found["modepress_block_seconds", "modegpt a", "0.9"] == pytest.approx(
        1.8
    )  # between the 20th and the 21st of 23
    assert (found["modepress_workers", "ready"], found["modepress_stragglers",]) == (1, 1)
    with writing(place.engine) as session:  # a job with a heartbeat of unknown peak
        row = session.query(JobRow).one()
        row.heartbeat = {**row.heartbeat, "mfu": None}
    assert "\nmodepress_mfu " not in Metrics(place.engine, place.settings).text().decode()
