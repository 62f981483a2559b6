"""Files that must not be in a model folder: each is made here and refused by its name, and nothing of it ever runs."""

import gzip
import io
import os
import pickle
import socket
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from preflight.checkpoint import describe, open_checkpoint
from tests.preflight.breaking import WEIGHTS, refused


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("pwned",))


def torch_zip() -> bytes:
    target = io.BytesIO()
    torch.save({"x": torch.ones(1)}, target)
    return target.getvalue()


def old_torch() -> bytes:
    target = io.BytesIO()
    torch.save({"x": torch.ones(1)}, target, _use_new_zipfile_serialization=False)
    return target.getvalue()


def zip_of(name: str) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(name, b"x")
    return target.getvalue()


def tar_of(name: str) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return target.getvalue()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.PTH", "a.pkl", "a.ckpt", "nested/training_args.bin"])
def test_pickles_by_name(model: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"harmless")
    error = refused(model)
    assert (error.code, error.param) == ("pickle_refused", name)


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.model", "notes.txt"])
@pytest.mark.parametrize("content", [*(pickle.dumps(Malice(), p) for p in range(6)), torch_zip(), old_torch()])
def test_pickles_by_content(model: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> None:
    monkeypatch.chdir(model.parent)
    (model / name).write_bytes(content)
    error = refused(model)
    assert (error.code, error.param) == ("pickle_refused", name)
    assert not Path("pwned").exists()


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x8B1F])
def test_a_header_length_that_looks_like_a_pickle_or_gzip_is_none(model: Path, length: int) -> None:
    path = model / WEIGHTS
    data = path.read_bytes()
    old = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + old].rstrip()
    length += 2**16 if length < len(header) else 0
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + data[8 + old :])
    assert describe(open_checkpoint(model)).blockers == ()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.zip", b""),
        ("model.tar.gz", b""),
        (WEIGHTS, zip_of("../../escape.txt")),
        ("notes.txt", tar_of("../../escape.txt")),
        ("notes.txt", gzip.compress(b"x")),
        ("notes.txt", b"PK\x03\x04 broken"),
        ("notes.txt", b"\xfd7zXZ\x00"),
    ],
)
def test_archives(model: Path, name: str, content: bytes) -> None:
    (model / name).write_bytes(content)
    error = refused(model)
    assert (error.code, error.param) == ("archive_not_accepted", name)


def test_symbolic_links(model: Path, tmp_path: Path) -> None:
    for name, target in (("notes.txt", "/etc/passwd"), ("copy.json", model / "config.json"), ("inner", tmp_path)):
        (model / name).symlink_to(target)
        error = refused(model)
        assert (error.code, error.param) == ("symlink_refused", name)
        (model / name).unlink()


def test_pipes_and_sockets_do_not_hang(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(model / WEIGHTS.replace("model", "pipe"))
    assert refused(model).code == "special_file_refused"
    (model / "pipe.safetensors").unlink()
    monkeypatch.chdir(model)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert refused(model).code == "special_file_refused"


def test_a_maze_of_folders(model: Path) -> None:
    (model / "/".join("abcdefghij")).mkdir(parents=True)
    assert refused(model).code == "too_many_files"


def test_unreadable_files(model: Path) -> None:
    (model / WEIGHTS).chmod(0)
    user = os.geteuid()
    if user == 0:  # root reads everything
        os.seteuid(65534)
    try:
        error = refused(model)
    finally:
        os.seteuid(user)
    assert error.code == "unreadable_file"
