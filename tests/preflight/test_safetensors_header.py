"""Headers of safetensors files: what is sound is read exactly, anything else is an InvalidCheckpoint, nothing worse."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from api_schemas.errors import InvalidCheckpoint
from preflight.safetensors_header import DTYPE_BITS, MAX_HEADER_BYTES, read_header


def write(path: Path, header: object, body: int = 0, *, length: int | None = None) -> Path:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(data) if length is None else length) + data + b"\0" * body)
    return path


def tensor(start: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_agrees_with_the_library(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3), "a": torch.ones(4), "empty": torch.zeros(0, 5)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    entries = read_header(path)
    assert entries.keys() == tensors.keys()
    for name, value in tensors.items():
        entry = entries[name]
        assert (entry.shape, entry.parameters, entry.bytes) == (tuple(value.shape), value.numel(), value.nbytes)
        stored = path.read_bytes()[entry.start : entry.end]
        assert stored == value.contiguous().view(torch.uint8).numpy().tobytes()


def test_every_named_dtype_has_its_size(tmp_path: Path) -> None:
    for dtype, bits in DTYPE_BITS.items():
        path = write(tmp_path / "x.safetensors", {"x": tensor(0, bits, (8,), dtype)}, bits)
        assert read_header(path)["x"].bytes == bits


@pytest.mark.parametrize(
    ("header", "body", "code", "words"),
    [
        ({"a": tensor()}, 7, "truncated_file", "bytes"),
        ({"a": tensor()}, 9, "invalid_header", "after the last tensor"),
        ({"a": tensor(), "b": tensor(4, 12)}, 12, "invalid_header", "overlaps"),
        ({"a": tensor(), "b": tensor(12, 20)}, 20, "invalid_header", "gap"),
        ({"a": tensor(4, 12)}, 12, "invalid_header", "gap"),
        ({"a": tensor(shape=(3,))}, 8, "invalid_header", "F32"),
        ({"a": tensor(dtype="F16")}, 8, "invalid_header", "F16"),
        ({"a": tensor(dtype="F4", shape=(3,), end=1)}, 1, "invalid_header", "F4"),
        ({"a": tensor(shape=(-1, -2))}, 8, "invalid_header", "shape"),
        ({"a": tensor(shape=(True, 2))}, 8, "invalid_header", "shape"),
        ({"a": tensor(shape=(2.0,))}, 8, "invalid_header", "shape"),
        ({"a": tensor(shape=(2**63,))}, 8, "invalid_header", "shape"),
        ({"a": tensor(shape=[2**62] * 64)}, 8, "invalid_header", "F32"),
        ({"a": tensor(shape=[1] * 65)}, 4, "invalid_header", "shape"),
        ({"a": tensor(shape="2")}, 8, "invalid_header", "shape"),
        ({"a": tensor(dtype="Q4_1")}, 8, "invalid_header", "dtype"),
        ({"a": tensor(dtype=["F32"])}, 8, "invalid_header", "dtype"),
        ({"a": tensor(8, 0)}, 8, "invalid_header", "bytes"),
        ({"a": {**tensor(), "data_offsets": [-8, 0]}}, 8, "invalid_header", "data_offsets"),
        ({"a": {**tensor(), "data_offsets": [0]}}, 8, "invalid_header", "data_offsets"),
        ({"a": {**tensor(), "code": "x"}}, 8, "invalid_header", "exactly"),
        ({"a": {"dtype": "F32"}}, 8, "invalid_header", "exactly"),
        ({"": tensor()}, 8, "invalid_header", "exactly"),
        ({"a": 5}, 8, "invalid_header", "exactly"),
        ({"a": tensor(), "__metadata__": {"format": 1}}, 8, "invalid_header", "__metadata__"),
        ({"a": tensor(), "__metadata__": []}, 8, "invalid_header", "__metadata__"),
        ([], 0, "invalid_header", "begin"),
        (b" {}", 0, "invalid_header", "begin"),
        (b'{"a": 1, "a": 2}', 0, "invalid_header", "duplicate key 'a'"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', 0, "invalid_header", "duplicate key 'dtype'"),
        (b'{"a": NaN}', 0, "invalid_header", "finite"),
        (b'{"a": 1e999}', 0, "invalid_header", "finite"),
        (b'{"a": ' + b"9" * 5000 + b"}", 0, "invalid_header", "JSON"),
        (b'{"a"', 0, "invalid_header", "JSON"),
        (b'{"\xff": 1}', 0, "invalid_header", "JSON"),
        (b'{"a": ' + b"[" * 200_000, 0, "invalid_header", "deeply"),
        (b"{" + b'"a":{' * 100_000, 0, "invalid_header", "deeply"),
        (b'{"a": [' + b"0," * 4_000_001, 0, "invalid_header", "more than"),
    ],
)
def test_a_hostile_header_is_named(tmp_path: Path, header: object, body: int, code: str, words: str) -> None:
    path = write(tmp_path / "model.safetensors", header, body)
    with pytest.raises(InvalidCheckpoint, match=words) as caught:
        read_header(path)
    assert caught.value.code == code
    assert "model.safetensors" in caught.value.message
    assert len(caught.value.message) < 600


def test_lengths_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for length, code in (
        (100, "truncated_file"),
        (MAX_HEADER_BYTES + 1, "header_too_large"),
        (2**64 - 1, "header_too_large"),
    ):
        write(path, b"{}", length=length)
        with pytest.raises(InvalidCheckpoint) as caught:
            read_header(path)
        assert caught.value.code == code


def test_a_file_without_even_a_length(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for size in (0, 7):
        path.write_bytes(b"\0" * size)
        with pytest.raises(InvalidCheckpoint, match="push it again") as caught:
            read_header(path)
        assert caught.value.code == "truncated_file"


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2)}, whole, {"format": "pt"})
    data = whole.read_bytes()
    path = tmp_path / "model.safetensors"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(InvalidCheckpoint):
            read_header(path)


LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
)
SIZES = st.integers(-2, 40)
TENSORS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F33"]) | VALUES,
        "shape": st.lists(SIZES, max_size=3) | VALUES,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | VALUES,
    }
)
HEADERS = st.dictionaries(st.text(max_size=6), TENSORS | VALUES, max_size=4).map(
    lambda value: json.dumps(value).encode()
)
FUZZ = settings(max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=HEADERS | st.binary(max_size=200), body=st.integers(0, 64), shift=st.integers(-9, 9))
@example(data=b"{}", body=0, shift=0)
def test_whatever_the_bytes_only_one_kind_of_error(tmp_path: Path, data: bytes, body: int, shift: int) -> None:
    path = write(tmp_path / "model.safetensors", data, body, length=max(0, len(data) + shift))
    try:
        entries = read_header(path)
    except InvalidCheckpoint:
        return
    assert sum(entry.bytes for entry in entries.values()) <= path.stat().st_size


@FUZZ
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_one_changed_byte_never_reaches_outside_the_file(tmp_path: Path, position: int, value: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2)}, path, {"format": "pt"})
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        entries = read_header(path)
    except InvalidCheckpoint:
        return
    assert all(0 <= entry.start <= entry.end <= len(data) for entry in entries.values())
