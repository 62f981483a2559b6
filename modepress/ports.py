"""Ports on this machine."""

import random
import socket
from collections.abc import Iterator

# Below the range from which systems give ports to outgoing connections: what is free here stays free until a part of
# the stack, seconds later, binds it.
QUIET_PORTS = range(20_000, 32_000)
TRIES = 50


def port_to_use(host: str, wanted: int) -> int:
    """Return the wanted port when it is free, else a free one. Port 0 always asks for a free one."""
    for port in _candidates(wanted):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As the servers do it: a port that only waits out old connections counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                if port == 0:
                    raise
                continue
            return int(probe.getsockname()[1])
    raise OSError(f"no free port on {host}")


def _candidates(wanted: int) -> Iterator[int]:
    if wanted:
        yield wanted
    yield from random.SystemRandom().sample(QUIET_PORTS, TRIES)
    yield 0  # whatever the system has left
