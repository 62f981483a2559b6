"""The account of an import: nothing unused, nothing invented, everything readable afterwards."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from api_schemas.errors import Conflict, InvalidCheckpoint
from compression.importers.ledger import FILE, Key, Ledger, read_ledger
from compression.importers.sources import open_source
from compression.importers.writing import new_folder, write_weights

TARGETS = {"q": (2, 4), "k": (2, 4), "norm": (4,), "bias": (2,)}


def _ledger(folder: Path) -> Ledger:
    torch.manual_seed(0)
    torch.save({"model": {"qk": torch.randn(4, 4), "old": torch.ones(3)}, "optimizer": [torch.ones(7)]}, folder / "d")
    torch.save({"norm": torch.randn(4)}, folder / "base.bin")
    sources = {role: open_source(folder / name, role) for role, name in (("delta", "d"), ("language", "base.bin"))}
    return Ledger("example", sources, {"stale": "recomputed by the model"})


def _filled(folder: Path) -> Ledger:
    ledger = _ledger(folder)
    ledger.use("q", Key("delta", "qk"), how="first rows", build=lambda both: both[:2])
    ledger.use("k", Key("delta", "qk"), how="last rows", build=lambda both: both[2:])
    ledger.use("norm", Key("language", "norm"))
    ledger.use("bias", how="zeros: never trained", build=lambda: torch.zeros(2))
    return ledger


def test_a_balanced_account_is_written_and_read_back(tmp_path: Path) -> None:
    ledger = _filled(tmp_path)
    assert ledger.drop("delta", "stale", lambda name: name == "old") == ["old"]
    ledger.balance(TARGETS)
    with new_folder(tmp_path / "out") as folder:
        write_weights(ledger, TARGETS, folder, torch.float32, shard_bytes=40)
    record = read_ledger(tmp_path / "out")
    assert record["targets"]["q"] == {"from": ["delta:qk"], "how": "first rows"}
    assert record["targets"]["bias"] == {"from": [], "how": "zeros: never trained"}
    assert record["dropped"]["stale"] == {"why": "recomputed by the model", "bytes": 12, "keys": ["delta:old"]}
    assert record["dropped"]["optimizer_state"]["bytes"] == 28
    assert record["sources"]["delta"]["tensors"] == 2
    assert len(record["sources"]["delta"]["files"][0]["sha256"]) == 64
    assert record["bytes"]["written"] == 4 * (8 + 8 + 4 + 2)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == 3
    assert shards[0] == "model-00001-of-00003.safetensors"
    written = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / "out" / shard).items()}
    source = torch.load(tmp_path / "d", weights_only=True)["model"]["qk"]
    assert written.keys() == TARGETS.keys()
    assert torch.equal(torch.cat([written["q"], written["k"]]), source)


def _unused(ledger: Ledger) -> None:
    """`old` is neither used nor dropped."""


def _absent(ledger: Ledger) -> None:
    ledger.drop("delta", "stale", lambda name: name == "old")
    del ledger.entries["norm"]


def _foreign(ledger: Ledger) -> None:
    ledger.use("elsewhere", Key("delta", "old"))


def _misshapen(ledger: Ledger) -> None:
    ledger.drop("delta", "stale", lambda name: name == "old")
    del ledger.entries["k"]
    ledger.use("k", Key("delta", "qk"), build=lambda both: both[1:])


@pytest.mark.parametrize(
    ("spoil", "code", "param"),
    [
        (_unused, "unexpected_tensor", "old"),
        (_absent, "missing_tensor", "norm"),
        (_foreign, "unexpected_tensor", "elsewhere"),
        (_misshapen, "wrong_shape", "qk"),
    ],
)
def test_an_account_that_does_not_balance_names_the_key(
    tmp_path: Path, spoil: Callable[[Ledger], None], code: str, param: str
) -> None:
    ledger = _filled(tmp_path)
    spoil(ledger)
    with pytest.raises(InvalidCheckpoint) as caught:
        ledger.balance(TARGETS)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_a_source_without_the_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=r"delta \(d\) has no 'gone'") as caught:
        _ledger(tmp_path).use("q", Key("delta", "gone"))
    assert (caught.value.code, caught.value.param) == ("missing_tensor", "gone")
    ledger = _filled(tmp_path)
    with pytest.raises(ValueError, match="two sources"):
        ledger.use("norm", Key("delta", "old"))


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    ledger = _filled(tmp_path)
    ledger.entries.pop("norm")
    ledger.use("norm", Key("language", "norm"), build=lambda norm: norm * 1e6)
    ledger.drop("delta", "stale", lambda name: name == "old")
    ledger.balance(TARGETS)
    with pytest.raises(InvalidCheckpoint) as caught, new_folder(tmp_path / "out") as folder:
        write_weights(ledger, TARGETS, folder, torch.float16)
    assert (caught.value.code, caught.value.param) == ("overflow", "dtype")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    (tmp_path / "out").mkdir()
    with pytest.raises(Conflict), new_folder(tmp_path / "out"):
        raise AssertionError("the folder exists")
    with pytest.raises(InvalidCheckpoint, match=FILE):
        read_ledger(tmp_path / "out")


def _anonymous() -> int:
    """Bytes that this process holds and that no file backs: mapped pages of the originals do not count."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


def _growth(folder: Path, one: int, count: int) -> int:
    """By how much this process grows, in bytes, while it writes `count` tensors of `one` bytes each."""
    torch.save({str(n): torch.full((one // 4,), float(n)) for n in range(count)}, folder / "w.pth")
    ledger = Ledger("example", {"all": open_source(folder / "w.pth", "all")}, {})
    for number in range(count):
        ledger.use(str(number), Key("all", str(number)))
    targets = {str(number): (one // 4,) for number in range(count)}
    ledger.balance(targets)
    peaks: list[int] = []
    before, make = _anonymous(), ledger.make

    def watched(target: str) -> torch.Tensor:
        made = make(target)
        peaks.append(_anonymous())
        return made

    ledger.make = watched  # type: ignore[method-assign]
    with new_folder(folder / "out") as out:
        write_weights(ledger, targets, out, torch.float32)
    assert len(peaks) == count
    return max(peaks) - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_memory_is_that_of_one_tensor_not_of_the_model(tmp_path: Path) -> None:
    one, count = 16 * 1024**2, 10
    # in a fresh process: one that has run for long has free memory to give before it grows
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        assert fresh.submit(_growth, tmp_path, one, count).result() < 3 * one
