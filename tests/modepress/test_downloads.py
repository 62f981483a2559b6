"""Pulling a model from a real stack: whole, in part, over a line that breaks, and from a server that lies."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from api_schemas.errors import Conflict, InsufficientStorage, InvalidRequest, Unavailable
from modepress import Client, Unreachable, downloads
from tests.modepress.cutting_proxy import cutting_proxy
from tests.modepress.recipes import small_recipe
from tests.modepress.running_stack import RunningStack
from tests.modepress.test_cli import Shell

pytestmark = pytest.mark.servers


@pytest.fixture(scope="session")
def exported(stack: RunningStack, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The id of an artifact with a GGUF file."""
    with Client(stack.url, journal=tmp_path_factory.mktemp("journal")) as client:
        job = client.compress(tiny, small_recipe(exports=[{"format": "gguf", "dtype": "f32"}]), suffix="exported")
        ended = client.wait(job.id)
        assert ended.compressed_model is not None, ended.error
        return ended.compressed_model


def server_folder(stack: RunningStack, model: str) -> Path:
    return stack.home / "models" / model


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pull_brings_every_file_and_a_second_one_none(
    client: Client, stack: RunningStack, exported: str, tmp_path: Path
) -> None:
    heard = dict[str, int]()
    into = tmp_path / "deep" / "here"
    pulled = client.pull(exported, into, on_progress=lambda name, sent: heard.update({name: heard.get(name, 0) + sent}))
    assert tree(into) == tree(server_folder(stack, exported))
    assert {file.outcome for file in pulled} == {"fetched"}
    assert {file.path: file.sha256 for file in pulled} == {
        path: hashlib.sha256(data).hexdigest() for path, data in tree(into).items()
    }
    assert heard == {file.path: file.bytes for file in pulled}
    assert {file.outcome for file in client.pull(exported, into)} == {"already there"}


@pytest.mark.usefixtures("tiny")
def test_a_model_without_known_digests_is_counted_first(client: Client, tiny_folder: Path, tmp_path: Path) -> None:
    """Deleting the uploads forgets their digests; the server counts them again, and they are checked."""
    copy = client.push(tiny_folder, name="tiny-forgotten").id
    digests = {file.sha256 for file in client.files(copy)}
    for digest in digests:
        while (stored := uploads_of(client, str(digest))) is not None:
            client._connection.send("DELETE", f"/v1/files/{stored}", repeatable=False)
    assert {file.sha256 for file in client.files(copy)} == {None}
    assert {file.sha256 for file in client.pull(copy, tmp_path / "here")} == digests
    assert tree(tmp_path / "here") == tree(tiny_folder)


def uploads_of(client: Client, digest: str) -> str | None:
    response = client._connection.send("HEAD", f"/v1/files/sha256/{digest}", repeatable=True)
    return None if response.status_code == 404 else str(response.headers["x-file-id"])


def test_only_what_was_asked_for(client: Client, exported: str, tmp_path: Path) -> None:
    every = {file.path for file in client.files(exported)}
    exports = {path for path in every if path.startswith("exports/")}
    assert exports == {"exports/model-f32.gguf", "exports/self_test.json"}
    for only, expected in (
        (["gguf"], {"exports/model-f32.gguf"}),
        (["checkpoint"], every - exports),
        (["config.json"], {"config.json"}),
        (["exports"], exports),
        (["gguf", "config.json"], {"exports/model-f32.gguf", "config.json"}),
    ):
        into = tmp_path / "-".join(only)
        client.pull(exported, into, only=only)
        assert set(tree(into)) == expected
    with pytest.raises(InvalidRequest, match="has no 'vllm'; it has: checkpoint, exports, gguf") as refused:
        client.pull(exported, tmp_path / "none", only=["vllm"])
    assert refused.value.code == "nothing_to_pull"
    assert not (tmp_path / "none").exists()


def test_vllms_configuration_comes_with_the_checkpoint(client: Client, tiny: str, tmp_path: Path) -> None:
    step = {"method": "modegpt", "sparsity": 0.2, "layout": "nemotron", "round_to": 4}
    job = client.wait(client.compress(tiny, small_recipe(steps=[step], exports=[{"format": "vllm"}])).id)
    assert job.compressed_model is not None, job.error
    client.pull(job.compressed_model, tmp_path, only=["vllm"])
    there = set(tree(tmp_path))
    assert {"model.safetensors", "config.json", "exports/vllm/config.json"} < there
    assert "exports/self_test.json" not in there


def test_a_line_that_breaks_is_taken_up_where_it_broke(stack: RunningStack, exported: str, tmp_path: Path) -> None:
    size = (server_folder(stack, exported) / "model.safetensors").stat().st_size
    with cutting_proxy(stack.url, after=20_000, cuts=3) as proxy, Client(proxy.url) as over:
        pulled = over.pull(exported, tmp_path, only=["model.safetensors"])
    assert [file.bytes for file in pulled] == [size]
    assert tree(tmp_path) == {"model.safetensors": (server_folder(stack, exported) / "model.safetensors").read_bytes()}
    starts = [
        int(head.lower().split("range: bytes=")[1].split("-")[0]) for head in proxy.requests if "/content" in head
    ]
    assert len(starts) == 4
    assert starts == sorted(set(starts)), "each time from where it broke, never from the start again"


def test_a_pull_that_was_given_up_goes_on_later(
    client: Client, stack: RunningStack, exported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(downloads, "CUTS", 0)
    whole = (server_folder(stack, exported) / "model.safetensors").read_bytes()
    with cutting_proxy(stack.url, after=20_000, cuts=10**6) as proxy, Client(proxy.url) as over:
        files = downloads.chosen(client.files(exported), ["model.safetensors"], exported)
        begun = threading.Event()

        def given_up(_name: str, _bytes: int) -> None:
            begun.set()
            proxy._after = 0  # from now on nothing comes through

        with pytest.raises(Unreachable):
            downloads.fetch_all(over._connection, exported, files, tmp_path, given_up)
    assert begun.is_set()
    (part,) = tmp_path.iterdir()
    assert part.name.startswith(".model.safetensors.")
    assert part.suffix == ".part"
    assert 0 < part.stat().st_size < len(whole)
    assert whole.startswith(part.read_bytes())
    (pulled,) = client.pull(exported, tmp_path, only=["model.safetensors"])
    assert pulled.outcome == "resumed"
    assert tree(tmp_path) == {"model.safetensors": whole}


def test_a_damaged_part_is_noticed_and_thrown_away(client: Client, exported: str, tmp_path: Path) -> None:
    file = next(file for file in client.files(exported) if file.path == "config.json")
    part = tmp_path / f".config.json.{str(file.sha256)[:16]}.part"
    for damage in (b"?", b"?" * (file.bytes + 1)):
        part.write_bytes(damage)
        with pytest.raises(Unavailable, match=r"config\.json") as refused:
            client.pull(exported, tmp_path, only=["config.json"])
        assert refused.value.code == "digest_mismatch"
        assert list(tmp_path.iterdir()) == []
    assert client.pull(exported, tmp_path, only=["config.json"])[0].outcome == "fetched"


def test_a_file_that_differs_is_refused_by_name_before_anything_is_fetched(
    client: Client, exported: str, tmp_path: Path
) -> None:
    client.pull(exported, tmp_path / "one")
    changed = tmp_path / "one" / "tokenizer.json"
    data = changed.read_bytes()
    (tmp_path / "elsewhere").write_bytes(data)
    spoilings: tuple[Callable[[], object], ...] = (
        lambda: changed.write_bytes(data + b"\n"),
        lambda: changed.write_bytes(b"?" + data[1:]),
        lambda: changed.symlink_to(tmp_path / "elsewhere"),
        changed.mkdir,
    )
    for spoil in spoilings:
        changed.unlink()
        spoil()
        (tmp_path / "one" / "config.json").unlink(missing_ok=True)
        with pytest.raises(Conflict, match=r"tokenizer\.json exists") as refused:
            client.pull(exported, tmp_path / "one")
        assert refused.value.code == "file_differs"
        assert not (tmp_path / "one" / "config.json").exists()
    assert (tmp_path / "elsewhere").read_bytes() == data


def test_a_folder_that_cannot_be_written_is_named(client: Client, exported: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InvalidRequest, match="file") as refused:
        client.pull(exported, tmp_path / "file", only=["config.json"])
    assert refused.value.code == "not_writable"


@contextmanager
def lying_server(files: list[dict[str, Any]], data: bytes) -> Iterator[str]:
    """A server that lists what it likes and sends the same bytes for everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = {"object": "list", "data": files, "has_more": False, "first_id": None, "last_id": None}
            body = json.dumps(page).encode() if self.path.split("?")[0].endswith("/files") else data
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def listed(path: str, size: int, data: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    return {"path": path, "bytes": size, "sha256": digest, "belongs_to": "checkpoint", "layout": None}


@pytest.mark.parametrize("path", ["../evil", "/evil", "a/../../evil", "a\\..\\evil", "~/evil", "evil\n"])
def test_a_server_cannot_write_outside_the_folder(tmp_path: Path, path: str) -> None:
    with lying_server([listed(path, 4, b"evil")], b"evil") as url, Client(url) as client:
        with pytest.raises(InvalidRequest) as refused:
            client.pull("model", tmp_path / "in" / "here")
    assert refused.value.code == "unsafe_path"
    assert list(tmp_path.rglob("*")) == []


def test_a_server_that_sends_other_bytes_more_or_fewer(tmp_path: Path) -> None:
    for sent in (b"bad!", b"good and more", b"goo"):
        with lying_server([listed("file", 4, b"good")], sent) as url, Client(url) as client:
            with pytest.raises(Unavailable) as refused:
                client.pull("model", tmp_path)
        assert refused.value.code == "digest_mismatch"
        assert list(tmp_path.iterdir()) == []


def test_a_server_without_ranges_is_pulled_from_nevertheless(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / f".file.{digest[:16]}.part").write_bytes(data[:1000])
    with lying_server([listed("file", len(data), data)], data) as url, Client(url) as client:
        assert client.pull("model", tmp_path)[0].outcome == "resumed"
    assert tree(tmp_path) == {"file": data}


def test_a_model_larger_than_the_disk_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    with lying_server([listed("file", 2**60, b"")], b"") as url, Client(url) as client:
        with pytest.raises(InsufficientStorage) as refused:
            client.pull("model", tmp_path)
    assert refused.value.code == "disk_full"


def test_the_command_says_what_it_fetched(stack: RunningStack, exported: str, tmp_path: Path) -> None:
    shell = Shell(stack.home, tmp_path)
    assert "exports/model-f32.gguf" in shell.run("files", exported).stdout
    assert {file["belongs_to"] for file in shell.json("files", exported)} == {"checkpoint", "exports", "gguf"}
    done = shell.json("pull", exported, "--only", "gguf", "--into", "out")
    assert (done["model"], done["into"]) == (exported, str(tmp_path / "out"))
    assert [file["path"] for file in done["files"]] == ["exports/model-f32.gguf"]
    again = shell.run("pull", exported, "--only", "gguf", "--into", "out")
    assert again.returncode == 0
    assert again.stdout.splitlines()[-1] == f"0 of 1 files of {exported} fetched into out: 0 B"
    assert shell.run("pull", exported).returncode == 0
    assert tree(tmp_path / exported) == tree(server_folder(stack, exported))
    (tmp_path / exported / "config.json").write_text("{}")
    refused = shell.run("pull", exported)
    assert refused.returncode == 3
    assert "file_differs" in refused.stderr
    assert f"{exported}/config.json" in refused.stderr
    assert shell.run("pull", "nobody").returncode == 3
    assert shell.run("pull", exported, "--only", "vllm").returncode == 3
