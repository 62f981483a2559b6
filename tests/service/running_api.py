"""The API as users run it: a uvicorn process on a free port with its own data folder."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from job_store.database import make_engine, upgrade
from job_store.keys import KeyStore
from job_store.settings import Settings

START_SECONDS = 60.0


@dataclass(frozen=True)
class RunningApi:
    """A running server, a key for it, and where it keeps its data."""

    url: str
    key: str
    home: Path
    pid: int

    def client(self, **headers: str) -> httpx.Client:
        """Return a client that sends the key."""
        sent = {"authorization": f"Bearer {self.key}", **headers}
        return httpx.Client(base_url=self.url, headers=sent, timeout=120.0, trust_env=False)

    def settings(self) -> Settings:
        """Return the settings of the server, for looking behind the curtain."""
        return Settings(home=self.home)


def free_port() -> int:
    """Return a port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(command: list[str], url: str, log: Path, environment: dict[str, str]) -> Iterator[int]:
    """Run a server until the end of the block; yields its process id once `/healthz` answers."""
    with log.open("ab") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **environment}
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        process.wait(timeout=30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=2.0, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def running_api(home: Path, *, port: int | None = None, **settings: str) -> Iterator[RunningApi]:
    """Run the API over a data folder; `settings` are `MODEPRESS_*` without the prefix, in lower case."""
    home.mkdir(parents=True, exist_ok=True)
    engine = make_engine(Settings(home=home, database_url=settings.get("database_url")).resolved_database_url)
    upgrade(engine)
    key = KeyStore(engine).create("test").secret
    engine.dispose()
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {f"MODEPRESS_{name.upper()}": value for name, value in settings.items()}
    environment = {"MODEPRESS_HOME": str(home), "MODEPRESS_HUB_OFFLINE": "true", **environment}
    command = [sys.executable, "-m", "uvicorn", "service.app:create_app", "--factory", "--port", str(port)]
    command += ["--timeout-graceful-shutdown", "5", "--log-level", "warning"]
    with running(command, url, home / "api.log", environment) as pid:
        yield RunningApi(url=url, key=key, home=home, pid=pid)
