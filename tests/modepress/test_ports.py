"""Ports for the stack: the wanted one, or one that nobody else will be given meanwhile."""

import socket

from modepress.ports import QUIET_PORTS, port_to_use

HOST = "127.0.0.1"


def test_a_free_port_is_taken_as_it_is() -> None:
    free = port_to_use(HOST, 0)
    assert port_to_use(HOST, free) == free


def test_a_taken_port_gives_way_to_a_quiet_one() -> None:
    with socket.socket() as holder:
        holder.bind((HOST, 0))
        holder.listen()
        taken = holder.getsockname()[1]
        assert port_to_use(HOST, taken) != taken
        assert port_to_use(HOST, taken) in QUIET_PORTS
