"""NaN and infinity in weights, found by their bits and compared with what torch says."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from api_schemas.errors import InvalidCheckpoint
from preflight import weight_values
from preflight.checkpoint import open_checkpoint
from preflight.safetensors_header import read_header
from preflight.weight_values import check_values, first_nonfinite
from tests.preflight.breaking import edit_tensors

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def entry_of(path: Path, values: torch.Tensor) -> object:
    save_file({"x": values}, path, {"format": "pt"})
    return read_header(path)["x"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = torch.tensor([0.0, -0.0, info.max, info.min, info.tiny, info.smallest_normal], dtype=dtype)
    assert first_nonfinite(entry_of(tmp_path / "x.safetensors", values)) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_bad_element_is_found(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    values = torch.full((3, 5), torch.finfo(dtype).max, dtype=dtype)
    values[1, 2] = values[2, 0] = bad
    assert first_nonfinite(entry_of(tmp_path / "x.safetensors", values)) == 7


def test_chunks_are_joined_rightly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_values, "CHUNK_BYTES", 16)
    values = torch.zeros(41)
    values[37] = float("nan")
    assert first_nonfinite(entry_of(tmp_path / "x.safetensors", values)) == 37


@settings(max_examples=200, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=8, max_size=64), dtype=st.sampled_from(DTYPES))
def test_agrees_with_torch_on_any_bits(tmp_path: Path, data: bytes, dtype: torch.dtype) -> None:
    whole = data[: len(data) // dtype.itemsize * dtype.itemsize]
    values = torch.frombuffer(bytearray(whole), dtype=dtype)
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    assert first_nonfinite(entry_of(tmp_path / "x.safetensors", values)) == (bad[0] if bad else None)


def test_integers_have_no_nan(tmp_path: Path) -> None:
    assert first_nonfinite(entry_of(tmp_path / "x.safetensors", torch.full((8,), -1))) is None


def test_a_checkpoint_names_its_bad_tensor(model: Path) -> None:
    check_values(open_checkpoint(model).tensors)
    edit_tensors(model, lambda tensors: tensors["model.norm.weight"].__setitem__(3, float("nan")))
    with pytest.raises(InvalidCheckpoint, match="element 3") as caught:
        check_values(open_checkpoint(model).tensors)
    assert (caught.value.code, caught.value.param) == ("nonfinite_weights", "model.norm.weight")


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    entry = entry_of(tmp_path / "x.safetensors", torch.zeros(8))
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(InvalidCheckpoint) as caught:
        first_nonfinite(entry)
    assert caught.value.code == "truncated_file"
