"""Jobs over HTTP: planned before they are queued, replayed by key, followed by list and by stream."""

import json
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from api_schemas.events import ProgressEvent
from api_schemas.jobs import Usage
from job_store.database import make_engine
from job_store.jobs import JobStore
from job_store.leases import Ending, LeaseStore
from service.event_stream import stream_events
from tests.servers import wait_until
from tests.service.errors_seen import error_of
from tests.service.running_api import RunningApi, running_api

ENDING = Ending(status="cancelled", message="stopped", usage=Usage())
RECIPE: dict[str, Any] = {"steps": [{"method": "modegpt", "sparsity": 0.2}]}
BODY: dict[str, Any] = {"model": "tiny", "recipe": RECIPE}


def submit(client: httpx.Client, **changes: object) -> dict[str, Any]:
    answer = client.post("/v1/compression/jobs", json={**BODY, **changes})
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/compression/jobs/{job['id']}"
    return job


@pytest.fixture
def leases(api: RunningApi) -> Iterator[LeaseStore]:
    """The workers' side of the server's database: the tests play the worker."""
    engine = make_engine(api.settings().resolved_database_url)
    yield LeaseStore(engine, max_attempts=3)
    engine.dispose()


@pytest.fixture
def jobs(api: RunningApi) -> Iterator[JobStore]:
    """The job store over the server's database."""
    engine = make_engine(api.settings().resolved_database_url)
    yield JobStore(engine)
    engine.dispose()


def say(leases: LeaseStore, job: str, fence: int, message: str, percent: float) -> None:
    event = ProgressEvent(message=message, stage="compressing", block=0, blocks_total=2, percent=percent, data={})
    assert leases.record(job, fence, event)


def test_a_job_is_queued_listed_and_cancelled(client: httpx.Client) -> None:
    mark = uuid.uuid4().hex
    job = submit(client, metadata={"mark": mark, "other": "x"})
    assert (job["object"], job["status"], job["model"]) == ("compression.job", "queued", "tiny")
    assert job["recipe"]["calibration"]["source"] == "builtin"
    assert client.get(f"/v1/compression/jobs/{job['id']}").json() == job
    listed = client.get("/v1/compression/jobs", params={"metadata[mark]": mark}).json()
    assert [found["id"] for found in listed["data"]] == [job["id"]]
    assert client.get("/v1/compression/jobs", params={"metadata[mark]": "none"}).json()["data"] == []
    assert client.post(f"/v1/compression/jobs/{job['id']}/cancel").json()["status"] == "cancelled"
    error_of(client.post(f"/v1/compression/jobs/{job['id']}/cancel"), 409, "job_not_cancellable")
    error_of(client.get(f"/v1/compression/jobs/{job['id']}/report"), 404, "report_not_ready")


def test_jobs_page_by_cursor(client: httpx.Client) -> None:
    mark = uuid.uuid4().hex
    made = [submit(client, metadata={"mark": mark})["id"] for _ in range(3)]
    params = {"metadata[mark]": mark, "limit": "2"}
    first = client.get("/v1/compression/jobs", params=params).json()
    second = client.get("/v1/compression/jobs", params={**params, "after": first["last_id"]}).json()
    assert [job["id"] for job in (*first["data"], *second["data"])] == made[::-1]
    assert (first["has_more"], second["has_more"]) == (True, False)
    error_of(client.get("/v1/compression/jobs?after=none"), 404, "job_not_found")
    error_of(client.get("/v1/compression/jobs?metadata[]=x"), 400, "invalid_value")
    error_of(
        client.get("/v1/compression/jobs", params={f"metadata[{n}]": "x" for n in range(17)}), 400, "invalid_value"
    )
    error_of(client.get("/v1/compression/jobs?metadata[k]=%00"), 400, "invalid_metadata")


def test_the_same_key_makes_one_job(client: httpx.Client) -> None:
    headers = {"idempotency-key": uuid.uuid4().hex}
    first = client.post("/v1/compression/jobs", json=BODY, headers=headers)
    again = client.post("/v1/compression/jobs", json=BODY, headers=headers)
    assert (first.status_code, again.status_code) == (202, 200)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["idempotent-replayed"] == "true"
    other = {**BODY, "recipe": {**RECIPE, "seed": 1}}
    answer = client.post("/v1/compression/jobs", json=other, headers=headers)
    assert error_of(answer, 422, "idempotency_key_reused")["param"] == "Idempotency-Key"
    for wrong in ("", "x" * 257):
        answer = client.post("/v1/compression/jobs", json=BODY, headers={"idempotency-key": wrong})
        assert error_of(answer, 422, "invalid_value")["param"] == "idempotency-key"


def test_a_replay_is_answered_after_the_model_is_gone(client: httpx.Client, tiny_folder: Path) -> None:
    registered = client.post("/v1/models", json={"name": "leaves", "path": str(tiny_folder)})
    assert registered.status_code == 201, registered.text
    body, headers = {**BODY, "model": "leaves"}, {"idempotency-key": uuid.uuid4().hex}
    first = client.post("/v1/compression/jobs", json=body, headers=headers).json()
    client.post(f"/v1/compression/jobs/{first['id']}/cancel")
    assert client.delete("/v1/models/leaves").status_code == 200
    error_of(client.post("/v1/compression/jobs", json=body), 404, "model_not_found")
    again = client.post("/v1/compression/jobs", json=body, headers=headers)
    assert (again.status_code, again.json()["id"], again.json()["status"]) == (200, first["id"], "cancelled")


def test_the_same_key_at_once_makes_one_job(api: RunningApi) -> None:
    headers = {"idempotency-key": uuid.uuid4().hex}
    answers: list[httpx.Response] = []

    def post() -> None:
        with api.client() as client:
            answers.append(client.post("/v1/compression/jobs", json=BODY, headers=headers))

    threads = [threading.Thread(target=post) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [202]
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_a_plan_is_a_dry_run(client: httpx.Client) -> None:
    before = client.get("/v1/compression/jobs").json()
    plan = client.post("/v1/compression/plans", json=BODY)
    assert plan.status_code == 200, plan.text
    assert plan.json()["object"] == "compression.plan"
    assert plan.json()["bytes_after"] < plan.json()["bytes_before"]
    assert plan.json()["blockers"] == []
    assert client.get("/v1/compression/jobs").json() == before


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        ({"source": "file", "path": "/etc/hostname"}, "path_not_allowed", "path"),
        ({"source": "file", "path": "{root}/none.txt"}, "path_not_found", "path"),
        ({"source": "file", "path": "../text.txt"}, "unsafe_path", "path"),
        ({"source": "upload", "file_id": "file-none"}, "file_not_found", "file_id"),
        ({"source": "hub", "dataset": "wikitext"}, "hub_offline", "dataset"),
    ],
)
@pytest.mark.parametrize("role", ["calibration", "evaluation"])
def test_what_stands_in_the_way_is_named_before_queueing(
    client: httpx.Client, tiny_folder: Path, role: str, text: dict[str, str], code: str, param: str
) -> None:
    text = {key: value.format(root=tiny_folder.parent) for key, value in text.items()}
    body = {**BODY, "recipe": {**RECIPE, role: text}}
    before = client.get("/v1/compression/jobs").json()
    plan = client.post("/v1/compression/plans", json=body).json()
    assert [(found["code"], found["param"]) for found in plan["blockers"]] == [(code, f"recipe.{role}.{param}")]
    error = error_of(client.post("/v1/compression/jobs", json=body), 400, code)
    assert error["param"] == f"recipe.{role}.{param}"
    assert client.get("/v1/compression/jobs").json() == before


def test_blockers_of_the_recipe_refuse_the_job(client: httpx.Client) -> None:
    step = {"method": "modegpt", "sparsity": 0.2, "modules": ["query_key"]}
    body = {**BODY, "recipe": {"steps": [step]}}
    error = error_of(client.post("/v1/compression/jobs", json=body), 400, "portable_needs_both")
    assert error["param"] == "recipe.steps.0.modules"


def test_an_unknown_model(client: httpx.Client) -> None:
    for route in ("jobs", "plans"):
        answer = client.post(f"/v1/compression/{route}", json={**BODY, "model": "none"})
        assert error_of(answer, 404, "model_not_found")["param"] == "model"


def test_without_a_broker_nothing_is_queued(tmp_path: Path, tiny_folder: Path) -> None:
    with running_api(tmp_path / "home", model_roots=str(tiny_folder.parent)) as api, api.client() as client:
        client.post("/v1/models", json={"name": "tiny", "path": str(tiny_folder)})
        answer = client.post("/v1/compression/jobs", json=BODY)
        assert "MODEPRESS_BROKER_URL" in error_of(answer, 503, "no_broker")["message"]
        assert client.get("/v1/compression/jobs").json()["data"] == []


def test_a_broker_that_is_away_only_delays(tmp_path: Path, tiny_folder: Path) -> None:
    settings = {"model_roots": str(tiny_folder.parent), "broker_url": "redis://127.0.0.1:1/0"}
    with running_api(tmp_path / "home", **settings) as api, api.client() as client:
        client.post("/v1/models", json={"name": "tiny", "path": str(tiny_folder)})
        job = submit(client)
        assert client.get(f"/v1/compression/jobs/{job['id']}").json()["status"] == "queued"
        assert client.get("/readyz").json()["checks"]["broker"]["ok"] is False


def test_events_as_a_list(client: httpx.Client, leases: LeaseStore) -> None:
    job = submit(client)["id"]
    claim = leases.claim(job, "test", 60)
    assert claim is not None
    say(leases, job, claim.fence, "block 0", 50.0)
    route = f"/v1/compression/jobs/{job}/events"
    page = client.get(route).json()
    assert [event["sequence"] for event in page["data"]] == list(range(1, len(page["data"]) + 1))
    assert page["data"][-1]["message"] == "block 0"
    assert page["data"][0]["object"] == "compression.job.event"
    rest = client.get(route, params={"after": page["first_id"], "limit": 1}).json()
    assert [event["sequence"] for event in rest["data"]] == [2]
    assert rest["has_more"] is True
    assert client.get(route, params={"after": "2"}).json()["data"] == page["data"][2:]
    for wrong in ("x", "-1", "job-other-1"):
        assert error_of(client.get(route, params={"after": wrong}), 400, "invalid_value")["param"] == "after"
    shown = client.get(f"/v1/compression/jobs/{job}").json()
    assert shown["progress"] == {"stage": "compressing", "block": 0, "blocks_total": 2, "percent": 50.0}
    assert shown["estimated_finish"] is not None
    client.post(f"/v1/compression/jobs/{job}/cancel")


def read_stream(answer: httpx.Response) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Yield (event, id, data) of a stream until it ends."""
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif not line and fields:
            yield fields["event"], fields.get("id"), json.loads(fields["data"])
            fields = {}


def test_events_as_a_stream_end_with_the_job(client: httpx.Client, leases: LeaseStore) -> None:
    """The stream tells events as they happen, goes on from Last-Event-ID and closes after the terminal status."""
    job = submit(client)["id"]
    route = f"/v1/compression/jobs/{job}/events"
    claim = leases.claim(job, "test", 60)
    assert claim is not None
    seen: list[tuple[str, str | None, dict[str, Any]]] = []
    with client.stream("GET", route, headers={"accept": "text/event-stream"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        for event in read_stream(answer):
            seen.append(event)
            if len(seen) == 2:
                say(leases, job, claim.fence, "told while streaming", 10.0)
            if event[2].get("message") == "told while streaming":
                break
    assert [int(event[1] or 0) for event in seen] == list(range(1, len(seen) + 1))
    say(leases, job, claim.fence, "told while nobody listened", 20.0)
    resumed: list[tuple[str, str | None, dict[str, Any]]] = []
    last = str(seen[-1][1])
    with client.stream("GET", route, params={"stream": "true"}, headers={"last-event-id": last}) as answer:
        for event in read_stream(answer):
            resumed.append(event)
            if len(resumed) == 1:
                assert leases.finish(job, claim.fence, ENDING)
    assert resumed[0][2]["message"] == "told while nobody listened"
    assert [int(event[1]) for event in resumed if event[1]] == list(range(int(last) + 1, int(last) + len(resumed)))
    assert [event[0] for event in resumed] == ["job.event"] * (len(resumed) - 1) + ["job.status"]
    assert resumed[-1][2]["status"] == "cancelled"
    with client.stream("GET", route, headers={"accept": "text/event-stream"}) as answer:
        whole = list(read_stream(answer))
    assert [event for event in whole if event[1]] == [event for event in (*seen, *resumed) if event[1]]


def test_a_stream_of_no_job(client: httpx.Client) -> None:
    error_of(client.get("/v1/compression/jobs/none/events?stream=true"), 404, "job_not_found")
    job = submit(client)["id"]
    route = f"/v1/compression/jobs/{job}/events?stream=true"
    answer = client.get(route, headers={"last-event-id": "x"})
    assert error_of(answer, 400, "invalid_value")["param"] == "Last-Event-ID"
    client.post(f"/v1/compression/jobs/{job}/cancel")


def test_a_model_and_a_file_in_use_stay(client: httpx.Client) -> None:
    text = client.post("/v1/files", files={"file": ("t.txt", b"text")}, data={"purpose": "calibration"}).json()["id"]
    calibration = {"source": "upload", "file_id": text}
    job = submit(client, recipe={**RECIPE, "calibration": calibration})["id"]
    assert "cancel the job" in error_of(client.delete("/v1/models/tiny"), 409, "model_in_use")["message"]
    assert job in error_of(client.delete(f"/v1/files/{text}"), 409, "file_in_use")["message"]
    client.post(f"/v1/compression/jobs/{job}/cancel")
    assert client.delete(f"/v1/files/{text}").status_code == 200


def test_job_store_sees_what_the_api_wrote(jobs: JobStore, client: httpx.Client) -> None:
    job = submit(client, suffix="small")
    stored = jobs.get(job["id"])
    assert stored.model_dump(mode="json") == job
    client.post(f"/v1/compression/jobs/{job['id']}/cancel")


def test_a_quiet_stream_is_kept_alive(jobs: JobStore, client: httpx.Client) -> None:
    """The interval is asserted, not waited for."""
    job = submit(client)["id"]
    assert stream_events(jobs, job, 0).ping_interval == 15
    client.post(f"/v1/compression/jobs/{job}/cancel")


def test_an_open_stream_does_not_hold_up_the_end_of_the_server(
    tmp_path: Path, tiny_folder: Path, redis_url: str
) -> None:
    settings = {"model_roots": str(tiny_folder.parent), "broker_url": redis_url}
    with running_api(tmp_path / "home", **settings) as api, api.client() as client:
        client.post("/v1/models", json={"name": "tiny", "path": str(tiny_folder)})
        route = f"/v1/compression/jobs/{submit(client)['id']}/events"
        with client.stream("GET", route, headers={"accept": "text/event-stream"}) as answer:
            lines = answer.iter_lines()
            assert next(lines)
            os.kill(api.pid, signal.SIGTERM)
            with suppress(httpx.TransportError):  # an aborted stream is as good an end as a closed one
                for _ in lines:
                    continue
            wait_until(lambda: psutil.Process(api.pid).status() == psutil.STATUS_ZOMBIE, what="the end of the server")
