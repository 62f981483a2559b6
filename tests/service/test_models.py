"""Models over HTTP: pushed, refused by name, listed, deleted; hostile ones leave no trace."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.errors_seen import error_of
from tests.service.running_api import RunningApi


def push(
    client: httpx.Client, folder: Path, name: str, changes: dict[str, bytes | None] | None = None
) -> httpx.Response:
    """Push a folder's files, some of them replaced, added or (None) left out."""
    contents: dict[str, bytes | None] = {file.name: file.read_bytes() for file in folder.iterdir()}
    files = []
    for path, data in (contents | (changes or {})).items():
        if data is not None:
            sent = client.post("/v1/files", files={"file": ("f", data)}, data={"purpose": "model"})
            files.append({"file_id": sent.json()["id"], "path": path})
    return client.post("/v1/models", json={"name": name, "files": files})


def header(tensors: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_push_list_and_delete(client: httpx.Client, tiny_folder: Path) -> None:
    answer = push(client, tiny_folder, "pushed")
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == "/v1/models/pushed"
    model = answer.json()
    assert (model["object"], model["owned_by"], model["origin"]) == ("model", "default", "upload")
    assert model["facts"]["tied_head"] is False
    assert model["facts"]["parameters"] > model["facts"]["block_parameters"] > 0
    assert client.get("/v1/models/pushed").json() == model
    assert model in client.get("/v1/models").json()["data"]
    error_of(push(client, tiny_folder, "pushed"), 409, "model_exists")
    assert client.delete("/v1/models/pushed").json() == {"id": "pushed", "object": "model", "deleted": True}
    error_of(client.get("/v1/models/pushed"), 404, "model_not_found")
    error_of(client.delete("/v1/models/pushed"), 404, "model_not_found")


@pytest.mark.parametrize(
    "changes",
    [
        {"model.safetensors": b""},
        {"model.safetensors": b"\xff" * 8},
        {"model.safetensors": struct.pack("<Q", 2**40) + b"{}"},
        {"model.safetensors": header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}})},
        {
            "model.safetensors": header(
                {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}}, bytes(16)
            )
        },
        {
            "model.safetensors": header(
                {
                    "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                    "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
                },
                bytes(24),
            )
        },
        {"model.safetensors": None},
        {"config.json": None},
        {"config.json": b"[]"},
        {"tokenizer.json": b"{"},
        {"pytorch_model.bin": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94"},
        {"modeling_evil.py": b"import os"},
        {"weights.zip": b"PK\x03\x04"},
    ],
    ids=lambda changes: f"{next(iter(changes))}",
)
def test_corrupt_and_hostile_checkpoints(
    api: RunningApi, client: httpx.Client, tiny_folder: Path, changes: dict[str, bytes | None]
) -> None:
    answer = push(client, tiny_folder, "hostile", changes)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] not in (None, "", "invalid_value", "internal_error")
    assert len(error["message"]) > 20
    error_of(client.get("/v1/models/hostile"), 404, "model_not_found")
    assert not (api.home / "models" / "hostile").exists()
    assert not list((api.home / "tmp").glob("model.*"))


def test_an_unknown_architecture_is_listed_with_its_blocker_and_refused_as_a_job(
    client: httpx.Client, tiny_folder: Path
) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    config |= {"model_type": "unheard_of", "architectures": ["UnheardOfForCausalLM"]}
    model = push(client, tiny_folder, "unheard-of", {"config.json": json.dumps(config).encode()}).json()
    assert [blocker["code"] for blocker in model["facts"]["blockers"]] == ["unsupported_architecture"]
    assert model["capabilities"]["tasks"] == ["completion", "chat"]
    body = {"model": "unheard-of", "recipe": {"steps": [{"method": "modegpt", "sparsity": 0.2}]}}
    for route in ("plans", "jobs"):
        error = error_of(client.post(f"/v1/compression/{route}", json=body), 400, "unsupported_architecture")
        assert "unheard_of" in error["message"]
    assert client.delete("/v1/models/unheard-of").status_code == 200


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../../x", "a\\..\\x", "C:\\x", "a\0b", "a//b", ".", "..", "a/", "~/x", "a\nb"]
)
def test_hostile_names(client: httpx.Client, api: RunningApi, path: str) -> None:
    file = client.post("/v1/files", files={"file": ("f", b"x")}, data={"purpose": "model"}).json()["id"]
    body = {"name": "hostile", "files": [{"file_id": file, "path": path}]}
    assert error_of(client.post("/v1/models", json=body), 400, "unsafe_path")["param"] == "files.0.path"
    assert not list((api.home / "tmp").glob("model.*"))


def test_names_that_collide(client: httpx.Client) -> None:
    file = client.post("/v1/files", files={"file": ("f", b"x")}, data={"purpose": "model"}).json()["id"]
    files = [{"file_id": file, "path": "a"}, {"file_id": file, "path": "A"}]
    answer = client.post("/v1/models", json={"name": "hostile", "files": files})
    assert error_of(answer, 400, "duplicate_path")["param"] == "files.1.path"


def test_server_side_paths(client: httpx.Client, tiny_folder: Path) -> None:
    for path in ("/etc", "/", f"{tiny_folder.parent}/../..", "/proc/self"):
        error_of(client.post("/v1/models", json={"name": "p", "path": path}), 403, "path_not_allowed")
    error_of(client.post("/v1/models", json={"name": "p", "path": f"{tiny_folder}-none"}), 400, "path_not_found")
    error_of(client.post("/v1/models", json={"name": "p", "path": "relative"}), 400, "unsafe_path")
    error_of(
        client.post("/v1/models", json={"name": "p", "path": f"{tiny_folder.parent}/{'a' * 300}"}),
        400,
        "path_not_found",
    )


def test_a_link_out_of_the_root(client: httpx.Client, tiny_folder: Path) -> None:
    way_out = tiny_folder.parent / "way-out"
    way_out.symlink_to("/etc")
    inside = tiny_folder.parent / "linked"
    inside.mkdir()
    for file in tiny_folder.iterdir():
        os.link(file, inside / file.name)
    (inside / "notes.txt").symlink_to("/etc/hostname")
    error_of(client.post("/v1/models", json={"name": "p", "path": str(way_out)}), 403, "path_not_allowed")
    error_of(client.post("/v1/models", json={"name": "p", "path": str(inside)}), 400, "symlink_refused")


def test_the_hub_is_refused_offline(client: httpx.Client) -> None:
    answer = client.post("/v1/models", json={"name": "hub", "hub_id": "org/model"})
    assert "MODEPRESS_HUB_OFFLINE" in error_of(answer, 400, "hub_offline")["message"]


def test_an_unknown_file(client: httpx.Client) -> None:
    body = {"name": "m", "files": [{"file_id": "file-none", "path": "config.json"}]}
    assert error_of(client.post("/v1/models", json=body), 404, "file_not_found")["param"] == "files.0.file_id"


def test_the_list_pages(client: httpx.Client) -> None:
    page = client.get("/v1/models?limit=1").json()
    assert page["object"] == "list"
    error_of(client.get("/v1/models?after=none"), 404, "model_not_found")
