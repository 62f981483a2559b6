"""A line between client and server that is cut, again and again, after so many bytes of answers."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


class CuttingProxy:
    """Passes connections on; the first `cuts` that carry more than `after` bytes of answers are closed there.

    Attributes:
        requests: the request heads it has seen, for tests that ask what a client asked for again.
    """

    def __init__(self, url: str, *, after: int, cuts: int) -> None:
        address = urlsplit(url)
        self._target = (str(address.hostname), int(address.port or 80))
        self._after = after
        self._cuts = cuts
        self._lock = threading.Lock()
        self.requests: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no further connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return  # closed
            server = socket.create_connection(self._target)
            threading.Thread(target=self._there, args=(caller, server), daemon=True).start()
            threading.Thread(target=self._back, args=(server, caller), daemon=True).start()

    def _there(self, caller: socket.socket, server: socket.socket) -> None:
        try:
            while data := caller.recv(65536):
                self.requests.append(data.decode("latin-1"))
                server.sendall(data)
        except OSError:
            return  # the other thread has cut it

    def _back(self, server: socket.socket, caller: socket.socket) -> None:
        passed = 0
        while data := server.recv(4096):
            passed += len(data)
            if passed > self._after and self._spend_a_cut():
                break
            caller.sendall(data)
        for end in (caller, server):
            end.shutdown(socket.SHUT_RDWR)  # close alone would wait for the thread that reads from it
            end.close()

    def _spend_a_cut(self) -> bool:
        with self._lock:
            self._cuts -= 1
            return self._cuts >= 0


@contextmanager
def cutting_proxy(url: str, *, after: int, cuts: int) -> Iterator[CuttingProxy]:
    """Run such a line in front of a server while the body runs."""
    proxy = CuttingProxy(url, after=after, cuts=cuts)
    try:
        yield proxy
    finally:
        proxy.close()
