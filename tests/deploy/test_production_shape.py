"""The compose file's own commands and environment, without Docker, against a real PostgreSQL and a real Redis."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import psycopg
import pytest
from sqlalchemy.engine import make_url

from modepress import Client, ModepressApiError
from modepress.ports import port_to_use
from tests.deploy.test_compose import load
from tests.modepress.recipes import small_recipe
from tests.servers import wait_until
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.servers
STOP_SECONDS = 60.0


@dataclass
class Deployment:
    """The three processes of ours, started as compose would."""

    url: str
    environment: dict[str, str]


def command(service: str, port: int) -> list[str]:
    """The service's command, with this interpreter, on loopback and on a free port."""
    words = [sys.executable, *load()["services"][service]["command"][1:]]
    words = ["127.0.0.1" if word == "0.0.0.0" else word for word in words]  # noqa: S104 (it is what we replace)
    if "--port" in words:
        words[words.index("--port") + 1] = str(port)
    return words


def environment(service: str, replaced: dict[str, str]) -> dict[str, str]:
    """The service's environment, where only addresses differ."""
    said = {
        name: re.sub(r"\$\{[A-Z_]+(?::-([^}]*)|:\?[^}]*)\}", r"\1", str(value))
        for name, value in load()["services"][service]["environment"].items()
    }
    assert {name for name in replaced if name not in said} <= {"MODEPRESS_HOST", "MODEPRESS_PORT"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MODEPRESS_")}
    return {**kept, "OMP_NUM_THREADS": "1", **said, **{name: value for name, value in replaced.items() if name in said}}


@pytest.fixture
def deployment(tmp_path: Path, postgres_database: str, redis_url: str) -> Iterator[Deployment]:
    api, inference = (port_to_use("127.0.0.1", 0) for _ in range(2))
    replaced = {
        "MODEPRESS_HOME": str(tmp_path / "data"),
        "MODEPRESS_DATABASE_URL": make_url(postgres_database)
        .set(drivername="postgresql+psycopg")
        .render_as_string(hide_password=False),
        "MODEPRESS_BROKER_URL": redis_url,
        "MODEPRESS_INFERENCE_URL": f"http://127.0.0.1:{inference}",
        "MODEPRESS_HOST": "127.0.0.1",
        "MODEPRESS_PORT": str(api),
    }
    with ExitStack() as stack:
        for name, port in (("api", api), ("inference", inference), ("worker", 0)):
            log = stack.enter_context((tmp_path / f"{name}.log").open("w"))
            process = subprocess.Popen(
                command(name, port), env=environment(name, replaced), stdout=log, stderr=subprocess.STDOUT
            )
            stack.callback(process.wait, STOP_SECONDS)
            stack.callback(process.terminate)
        url = f"http://127.0.0.1:{api}"
        wait_until(lambda: _ready(url), seconds=120, what="readiness")
        yield Deployment(url, environment("api", replaced))


def test_a_job_from_push_to_chat(deployment: Deployment, tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "modepress", "keys", "create", "test"],
        env=deployment.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    key = made.stdout.splitlines()[0]
    with Client(deployment.url) as stranger, pytest.raises(ModepressApiError) as refused:
        stranger.models()
    assert refused.value.status == 401

    with Client(deployment.url, key, journal=tmp_path / "pushes") as client:
        model = client.push(make_tiny_model(tmp_path / "tiny"))
        job = client.wait(client.compress(model.id, small_recipe()).id)
        assert job.status == "succeeded", job.error
        assert client.report(job.id).reload.max_logit_difference <= client.report(job.id).reload.tolerance
        assert client.chat(str(job.compressed_model), "Hello", max_tokens=4).usage is not None

    with psycopg.connect(deployment.environment["MODEPRESS_DATABASE_URL"].replace("+psycopg", "")) as database:
        assert database.execute("SELECT status FROM jobs").fetchall() == [("succeeded",)]
        (digest,) = database.execute("SELECT digest FROM api_keys").fetchone() or ("",)
    assert key not in digest, "the key itself is not stored"


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False
