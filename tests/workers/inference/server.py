"""A real inference process on a free port, with a real database."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
from sqlalchemy import delete

from job_store.database import make_engine, upgrade, writing
from job_store.tables import ModelRow
from tests.servers import wait_until

START_SECONDS = 180
PATIENCE_SECONDS = 90  # for one answer of a tiny model on a busy machine


@contextmanager
def started_request(server: "InferenceServer", body: dict) -> Iterator[http.client.HTTPConnection]:
    """Send a chat request without waiting for its answer; leaving the body closes the connection."""
    address = httpx.URL(server.url)
    connection = http.client.HTTPConnection(address.host, address.port, timeout=PATIENCE_SECONDS)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        yield connection
    finally:
        connection.close()


class InferenceServer:
    """Starts `python -m workers.inference` on entering and stops it on leaving."""

    def __init__(self, home: Path, **environment: str) -> None:
        self._home = home
        self._database = make_engine(f"sqlite:///{home / 'modepress.db'}")
        self._log_path = home / "inference.log"
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("MODEPRESS_")},
            "MODEPRESS_HOME": str(home),
            "MODEPRESS_THREADS": "1",
            **environment,
        }

    def __enter__(self) -> "InferenceServer":
        upgrade(self._database)
        command = [sys.executable, "-m", "workers.inference", "--host", "127.0.0.1", "--port", "0"]
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            self.url = self._wait_for_url()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE_SECONDS)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.openai.close()
        self._database.dispose()
        self.stop()

    def stop(self) -> int:
        """Ask the process to stop, wait for it and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def register(self, name: str, folder: Path, *, created_at: float = 1.0, status: str = "ready") -> None:
        """Put a model into the table."""
        with writing(self._database) as session:
            row = ModelRow(id=name, created_at=created_at, status=status, origin="path", path=str(folder), request={})
            session.merge(row)

    def unregister(self, name: str) -> None:
        """Take a model out of the table."""
        with writing(self._database) as session:
            session.execute(delete(ModelRow).where(ModelRow.id == name))

    def log(self) -> str:
        """Return what the process wrote."""
        return self._log_path.read_text()

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples with these labels; 0 when there are none."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            sample = re.fullmatch(r"([^{\s]+)(?:\{(.*)\})? (\S+)", line)
            if (
                sample
                and sample[1] == name
                and all(f'{key}="{value}"' in (sample[2] or "") for key, value in labels.items())
            ):
                total += float(sample[3])
        return total

    def loaded(self) -> dict[str, dict]:
        """Return `/loaded` by model."""
        return {entry["id"]: entry for entry in self.http.get("/loaded").json()["data"]}

    def _wait_for_url(self) -> str:
        def started():
            assert self.process.poll() is None, f"the inference process ended:\n{self.log()}"
            return re.search(r"running on (http://127\.0\.0\.1:\d+)", self.log())

        return wait_until(started, seconds=START_SECONDS, what="the inference process's start")[1]
