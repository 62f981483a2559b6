"""A hub of our own: a server that speaks as much of the hub's protocol as a download needs."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


@contextmanager
def hub_server(repositories: dict[str, Path]) -> Iterator[str]:
    """Serve folders as model repositories by id; yields the endpoint for HF_ENDPOINT."""
    handler = type("Handler", (_Handler,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    repositories: dict[str, Path]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, *, body: bool) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        name = next((name for name in self.repositories if path.startswith(name + "/") or path == name), None)
        if name is None:
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        rest = path.removeprefix(name).strip("/").split("/")
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        folder = self.repositories[name]
        if rest[0] == "resolve":
            return self._send(200, (folder / "/".join(rest[2:])).read_bytes(), {"X-Repo-Commit": COMMIT}, body)
        if rest[0] == "tree":
            return self._send(200, json.dumps(_tree(folder)).encode(), {}, body)
        names = [{"rfilename": entry["path"]} for entry in _tree(folder)]
        info = {"id": name, "sha": COMMIT, "siblings": names, "tags": [], "downloads": 0, "likes": 0, "private": False}
        return self._send(200, json.dumps(info).encode(), {}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        all_headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Content-Length": str(len(content)),
            "Content-Type": "application/json",
            **headers,
        }
        for name, value in all_headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


def _tree(folder: Path) -> list[dict[str, object]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {
            "type": "file",
            "path": str(path.relative_to(folder)),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),  # noqa: S324 (git's own object id)
        }
        for path in files
    ]
