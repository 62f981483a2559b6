"""Files of weights from strangers: what is read, what is left, and that nothing in them ever runs."""

import argparse
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from api_schemas.errors import InvalidCheckpoint, NotFound
from compression.importers.pickled import Inert, read_pickle
from compression.importers.sources import open_source


def _weights() -> "OrderedDict[str, torch.Tensor]":
    torch.manual_seed(0)
    return OrderedDict(a=torch.randn(3, 4), b=torch.randn(2).half(), ids=torch.arange(5))


def _refused(path: Path) -> InvalidCheckpoint:
    with pytest.raises(InvalidCheckpoint) as caught:
        read_pickle(path)
    return caught.value


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapper", [None, "model", "module", "state_dict"])
def test_weights_are_found_in_every_wrapper(tmp_path: Path, wrapper: str | None, legacy: bool) -> None:
    path, weights = tmp_path / "w.pth", _weights()
    torch.save(weights if wrapper is None else {wrapper: weights}, path, _use_new_zipfile_serialization=not legacy)
    found = read_pickle(path)
    assert found.tensors.keys() == weights.keys()
    assert found.beside == {}
    for name, tensor in weights.items():
        assert torch.equal(found.tensors[name], tensor)
        assert found.tensors[name].dtype == tensor.dtype


def test_prefix_of_parallel_training_is_stripped_only_when_all_have_it(tmp_path: Path) -> None:
    torch.save({f"module.{name}": value for name, value in _weights().items()}, tmp_path / "all.pth")
    assert (read_pickle(tmp_path / "all.pth").stripped, set(read_pickle(tmp_path / "all.pth").tensors)) == (
        "module.",
        {"a", "b", "ids"},
    )
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "some.pth")
    assert set(read_pickle(tmp_path / "some.pth").tensors) == {"module.a", "b"}


def test_what_authors_keep_beside_the_weights_is_counted_and_not_read(tmp_path: Path) -> None:
    moments = {"state": {0: {"exp_avg": torch.ones(10), "exp_avg_sq": torch.ones(10)}}, "param_groups": [{"lr": 1e-4}]}
    beside: dict[str, Any] = {
        "optimizer": moments,
        "scaler": {"scale": 65536.0},
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-4, place=Path("/somewhere")),
        "best_score": np.float64(0.5),
    }
    torch.save({"model": _weights(), **beside}, tmp_path / "w.pth")
    found = read_pickle(tmp_path / "w.pth")
    assert found.beside == {
        "optimizer": ("optimizer_state", 80),
        "scaler": ("training_state", 0),
        "epoch": ("training_state", 0),
        "args": ("author_settings", 0),
        "best_score": ("training_state", 0),
    }


class DictConfig:
    """Stands for omegaconf's, which is not installed; pickled under that name below."""

    def __init__(self) -> None:
        self.content = {"lr": 1}


def test_a_class_that_is_not_installed_becomes_an_inert_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, module = types.ModuleType("omegaconf"), types.ModuleType("omegaconf.dictconfig")
    monkeypatch.setattr(DictConfig, "__module__", module.__name__)
    monkeypatch.setattr(module, "DictConfig", DictConfig, raising=False)
    monkeypatch.setattr(parent, "dictconfig", module, raising=False)
    with monkeypatch.context() as installed:
        installed.setitem(sys.modules, "omegaconf", parent)
        installed.setitem(sys.modules, "omegaconf.dictconfig", module)
        torch.save({"model": _weights(), "config": DictConfig()}, tmp_path / "w.pth")
    assert read_pickle(tmp_path / "w.pth").beside == {"config": ("author_settings", 0)}
    assert vars(Inert("anything")) == {}


class _Runs:
    """A pickle that would run a command when loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickle_with_code_is_refused_by_the_name_of_what_it_calls(tmp_path: Path, legacy: bool) -> None:
    path, mark = tmp_path / "w.pth", tmp_path / "ran"
    torch.save({"model": _weights(), "config": _Runs(mark)}, path, _use_new_zipfile_serialization=not legacy)
    error = _refused(path)
    assert error.code == "unsafe_pickle"
    assert "posix.system" in error.message
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_bare_pickle_with_code_is_refused(tmp_path: Path, protocol: int) -> None:
    path, mark = tmp_path / "w.pth", tmp_path / "ran"
    path.write_bytes(pickle.dumps(_Runs(mark), protocol=protocol))
    assert _refused(path).code in ("unsafe_pickle", "not_a_checkpoint")
    assert not mark.exists()


@pytest.mark.parametrize("call", [(torch.Tensor, (2**40,)), (bytearray, (2**40,))], ids=["Tensor", "bytearray"])
def test_what_torch_would_allow_but_no_weights_need_is_refused(tmp_path: Path, call: Any) -> None:
    class Asks:
        def __reduce__(self) -> Any:
            return call

    torch.save({"model": _weights(), "config": Asks()}, tmp_path / "w.pth")
    assert _refused(tmp_path / "w.pth").code == "unsafe_pickle"


@pytest.mark.parametrize("kept", [0.3, 0.9])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_truncated_upload_is_named(tmp_path: Path, kept: float, legacy: bool) -> None:
    path = tmp_path / "TinyGPT-V_for_Stage4.pth"
    torch.save({"model": {"w": torch.randn(500)}}, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    error = _refused(path)
    assert (error.code in ("truncated_file", "invalid_pickle"), error.param) == (True, path.name)
    assert error.code == "truncated_file" or legacy


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_bytes(b"<!DOCTYPE html><html>")
    assert _refused(tmp_path / "page.pth").code == "not_a_checkpoint"
    with zipfile.ZipFile(tmp_path / "clip.pt", "w") as archive:  # as torch.jit.save lays it out
        for inner in ("data.pkl", "code/__torch__.py", "constants.pkl"):
            archive.writestr(f"clip/{inner}", b"")
    assert _refused(tmp_path / "clip.pt").code == "torchscript_archive"
    torch.save([1, 2], tmp_path / "list.pth")
    assert _refused(tmp_path / "list.pth").code == "no_weights"
    torch.save({"model": {}}, tmp_path / "empty.pth")
    assert _refused(tmp_path / "empty.pth").code == "no_weights"
    torch.save({"model": {"w": 3}}, tmp_path / "number.pth")
    assert (_refused(tmp_path / "number.pth").code, _refused(tmp_path / "number.pth").param) == ("not_a_tensor", "w")
    torch.save({"model": _weights(), "surprise": 1}, tmp_path / "more.pth")
    assert (_refused(tmp_path / "more.pth").code, _refused(tmp_path / "more.pth").param) == (
        "unexpected_entry",
        "surprise",
    )
    with pytest.raises(NotFound) as caught:
        open_source(tmp_path / "path/to/weights", "delta")
    assert (caught.value.code, caught.value.param) == ("file_not_found", "delta")


def test_a_tensor_larger_than_what_is_stored_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**12)}, tmp_path / "w.pth")
    error = _refused(tmp_path / "w.pth")
    assert (error.code, error.param) == ("invalid_pickle", "w")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save(_weights(), tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as source,
        zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert _refused(tmp_path / "z.pth").code == "invalid_pickle"


def test_a_folder_of_shards_is_one_source(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "one.bin")
    torch.save({"b": torch.full((1,), torch.nan)}, tmp_path / "two.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "one.bin", "b": "two.bin"}}')
    source = open_source(tmp_path, "language")
    assert (set(source.stored), source.shape("a"), source.bytes("b")) == ({"a", "b"}, (2,), 4)
    assert torch.equal(source.read("a"), torch.ones(2))
    assert source.meta("a").is_meta
    with pytest.raises(InvalidCheckpoint) as caught:
        source.read("b")
    assert (caught.value.code, caught.value.param) == ("non_finite_weights", "b")
    (tmp_path / "two.bin").unlink()
    with pytest.raises(InvalidCheckpoint) as caught:
        open_source(tmp_path, "language")
    assert caught.value.code == "missing_shard"
