"""Random changes to sound headers: whatever the bytes, a door answers by name or lets a sound file through."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api_schemas.errors import InvalidCheckpoint
from preflight.gguf_header import check_gguf
from preflight.safetensors_header import read_header
from tests.hostile.corpus import SOUND, gguf_array, gguf_file, gguf_tensor, gguf_text

BOUNDED = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
PAIRS = gguf_array(4, 2, b"\0" * 8) + gguf_text(b"b") + struct.pack("<I", 8) + gguf_text(b"text")
SOUND_GGUF = gguf_file(keys=2, tensors=1, rest=PAIRS + gguf_tensor((2, 2))) + b"\0" * 64
CHANGES = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=6)


def _refusal(door: Callable[[Path], object], path: Path) -> InvalidCheckpoint | None:
    """What the door says; any other exception fails the test."""
    try:
        door(path)
    except InvalidCheckpoint as error:
        return error
    return None


def _changed(data: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
    broken = bytearray(data)
    for position, value in changes:
        broken[position % len(broken)] = value
    return bytes(broken[: len(broken) - cut % len(broken)])


def test_what_is_changed_is_sound_at_first(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(SOUND_GGUF)
    check_gguf(tmp_path / "a.gguf")
    (tmp_path / "a.safetensors").write_bytes(SOUND)
    assert list(read_header(tmp_path / "a.safetensors")) == ["a"]


@BOUNDED
@given(changes=CHANGES, cut=st.integers(0, 300))
def test_gguf(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(_changed(SOUND_GGUF, changes, cut))
    refusal = _refusal(check_gguf, path)
    if refusal is not None:
        assert refusal.code == "invalid_gguf"
        assert len(refusal.message) < 600


@BOUNDED
@given(changes=CHANGES, cut=st.integers(0, 100))
def test_safetensors(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(_changed(SOUND, changes, cut))
    refusal = _refusal(read_header, path)
    if refusal is not None:
        assert refusal.code in ("invalid_header", "truncated_file", "header_too_large")
    else:
        size = path.stat().st_size
        assert all(8 <= entry.start <= entry.end <= size for entry in read_header(path).values())


HEADER = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["F32", "BF16", "F4"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@BOUNDED
@given(
    header=st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), HEADER, max_size=4), body=st.integers(0, 64)
)
def test_safetensors_of_any_header(tmp_path: Path, header: dict[str, object], body: int) -> None:
    data = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(data)) + data + b"\0" * body)
    refusal = _refusal(read_header, path)
    assert refusal is None or refusal.code in ("invalid_header", "truncated_file")


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12])
def test_gguf_takes_each_kind_of_value(tmp_path: Path, kind: int) -> None:
    width = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}[kind]
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_file(keys=1, rest=gguf_text(b"k") + struct.pack("<I", kind) + b"\0" * width))
    check_gguf(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InvalidCheckpoint):
        check_gguf(path)
