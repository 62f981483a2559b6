"""`modepress up`: one per folder, leaves nobody behind, brings back what dies."""

import json
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from api_schemas.errors import InvalidRequest
from job_store.settings import Settings
from modepress import Client
from modepress.stack_plan import plan_stack
from tests.modepress.recipes import small_recipe
from tests.modepress.running_stack import RunningStack, all_gone, environment, running_stack
from tests.servers import wait_until
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.servers


@pytest.fixture
def own_stack(tmp_path: Path) -> Iterator[RunningStack]:
    with running_stack(tmp_path / "home") as running:
        yield running


def test_a_second_up_on_the_same_folder_is_refused(stack: RunningStack) -> None:
    configuration = (stack.home / "redis" / "redis.conf").read_text()
    second = subprocess.run(
        [sys.executable, "-m", "modepress", "up"], env=environment(stack.home), capture_output=True, text=True
    )
    assert second.returncode == 3
    assert len(second.stderr.splitlines()) == 1
    for word in ("already runs", stack.url, str(stack.process.pid)):
        assert word in second.stderr
    assert (stack.home / "redis" / "redis.conf").read_text() == configuration, "the refused one touched nothing"
    assert httpx.get(f"{stack.url}/readyz").status_code == 200


def test_state_file_names_everything_and_is_private(stack: RunningStack) -> None:
    path = stack.home / "stack.json"
    assert json.loads(path.read_text()) == stack.state
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert set(stack.state["parts"]) == {"broker", "api", "worker", "inference"}
    assert "@" not in stack.state["broker_url"], "no password in it"
    for name, pid in stack.state["parts"].items():
        assert psutil.pid_exists(pid), name


def test_everything_listens_on_loopback_alone(stack: RunningStack) -> None:
    for process in stack.family():
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip in {"127.0.0.1", "::1"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_everything(own_stack: RunningStack, number: signal.Signals) -> None:
    family = own_stack.family()
    assert len(family) >= 4
    assert own_stack.stop(number) == 0
    all_gone(family)
    assert not (own_stack.home / "stack.json").exists()


def test_a_stop_in_the_middle_of_a_job_ends_its_process_and_the_next_up_finishes_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    folder = make_tiny_model(tmp_path / "tiny")
    long_text = {"source": "builtin", "sequence_length": 256, "num_samples": 300}
    with running_stack(home) as first, Client(first.url, journal=tmp_path / "pushes") as client:
        job = client.compress(client.push(folder).id, small_recipe(calibration=long_text))
        wait_until(lambda: client.job(job.id).status == "running", what="start of the job")
        family = wait_until(
            lambda: [one for one in first.family() if _is_job(one)] and first.family(), what="job process"
        )
        assert first.stop() == 0
        all_gone(family)
    with running_stack(home) as second, Client(second.url) as client:
        assert client.wait(job.id).status == "succeeded"


def test_killing_up_itself_leaves_no_orphan(own_stack: RunningStack) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux tells a child of its parent's death")
    family = own_stack.family()
    own_stack.process.kill()
    own_stack.process.wait()
    all_gone(family)


def test_what_dies_comes_back(own_stack: RunningStack) -> None:
    path = own_stack.home / "stack.json"
    for name in ("inference", "broker", "worker", "api"):
        pid = _pid(path, name)
        psutil.Process(pid).kill()
        wait_until(partial(_has_successor, path, name, pid), what=f"new {name}")
    wait_until(lambda: _ready(own_stack.url), seconds=60, what="readiness")
    words = (own_stack.home.parent / "home.stderr").read_text()
    for name in ("inference", "broker", "worker", "api"):
        assert f"{name} died (signal SIGKILL); starting it again" in words


def test_a_taken_port_is_left_alone_and_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        plan = plan_stack(Settings(home=tmp_path, port=port))
    assert f"port {port} is taken" in plan.notices[0]
    assert not plan.url.endswith(f":{port}")


def test_a_host_that_others_can_reach_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as refused:
        plan_stack(Settings(home=tmp_path, host="0.0.0.0"))  # noqa: S104 (it must be refused)
    assert refused.value.code == "host_not_loopback"


def test_without_any_redis_the_file_broker_serves_and_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("modepress.broker_server.find_spec", lambda _: None)
    plan = plan_stack(Settings(home=tmp_path))
    assert [part.name for part in plan.parts] == ["api", "inference", "worker"]
    assert any("file-system broker" in notice for notice in plan.notices)
    assert plan.shown_broker_url == f"filesystem://{tmp_path / 'broker'}"


def test_without_torch_the_front_comes_up_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modepress.stack_plan.find_spec", lambda name: None if name == "torch" else object())
    plan = plan_stack(Settings(home=tmp_path))
    assert [part.name for part in plan.parts] == ["broker", "api"]
    (notice,) = [notice for notice in plan.notices if "torch" in notice]
    assert "pip install -e '.[worker]'" in notice


def test_a_part_that_cannot_start_ends_up_with_its_last_words(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "modepress.db").write_text("this is no database, and long enough to be told apart from an empty one" * 20)
    result = subprocess.run(
        [sys.executable, "-m", "modepress", "up"], env=environment(home), capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 1
    assert "stack_part_failed" in result.stderr
    assert "file is not a database" in result.stderr
    assert not (home / "stack.json").exists()


def test_a_job_runs_over_the_file_broker(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    broker = {"MODEPRESS_BROKER_URL": f"filesystem://{tmp_path / 'broker'}"}
    journal = tmp_path / "pushes"
    with running_stack(tmp_path / "home", extra=broker) as running, Client(running.url, journal=journal) as client:
        assert "broker" not in running.state["parts"]
        job = client.compress(client.push(folder).id, small_recipe())
        assert client.wait(job.id).status == "succeeded"


def _pid(state: Path, name: str) -> int:
    return int(json.loads(state.read_text())["parts"][name])


def _has_successor(state: Path, name: str, pid: int) -> bool:
    return _pid(state, name) != pid


def _is_job(process: psutil.Process) -> bool:
    try:
        return "workers.job_process" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False
