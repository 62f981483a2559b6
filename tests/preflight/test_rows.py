"""Row rules in the plan: the measured cases of SmolLM2's nine and three heads, and what a plan says of them."""

from pathlib import Path
from typing import Any

import pytest

from api_schemas.plans import BlockShape, Plan
from preflight.checkpoint import open_checkpoint
from preflight.families import Dimensions
from preflight.plans import make_plan
from preflight.rows import nf4_misfits
from tests.compression.test_pipeline import recipe
from tests.tiny_models import make_tiny_model

SMOL = Dimensions(576, 9, 3, 64, 1536, 30, 49152, True, 64, 64**-0.5)
ALL = ["mlp", "query_key", "value_output"]


def shape(rank: int, width: int = 1280) -> BlockShape:
    return BlockShape(mlp_width=width, query_key_rank=rank, value_output_rank=rank)


@pytest.mark.parametrize(("rank", "fits"), [(64, True), (48, False), (32, False)])
def test_what_bitsandbytes_packed_on_a_cpu(rank: int, fits: bool) -> None:
    """Ranks 48 and 32 failed at the first forward, the whole head ran: 9 × rank must be a multiple of 64."""
    assert (nf4_misfits(SMOL, [shape(rank)]) == []) is fits


def plan(folder: Path, step: dict[str, Any], **settings: Any) -> Plan:
    return make_plan(open_checkpoint(folder), recipe({"mode": "reference", **step}, **settings), model="tiny")


def test_odd_rows_are_warned_of_where_q8_0_is_asked_for(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", hidden=64, intermediate=96, head_dim=16)
    q8, f32 = [{"format": "gguf"}], [{"format": "gguf", "dtype": "f32"}]
    warned = plan(folder, {"round_to": 8}, exports=q8).warnings
    assert [text for text in warned if text.startswith("gguf_rows: mlp_width 48 is no multiple of 32")]
    assert not [text for text in plan(folder, {"round_to": 8}, exports=f32).warnings if "gguf_rows" in text]
    assert not [text for text in plan(folder, {"round_to": 32}, exports=q8).warnings if "gguf_rows" in text]
    reduced = plan(folder, {"round_to": 32, "modules": ALL, "sparsity": 0.4}, exports=q8)
    assert [text for text in reduced.warnings if text.startswith("gguf_rows: heads × rank 40")]


def test_widths_that_depend_on_data_are_judged_by_their_step(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", hidden=64, intermediate=96, head_dim=16)
    step = {"layout": "nemotron", "allocation": "block_influence"}
    warned = plan(folder, {**step, "round_to": 8}, exports=[{"format": "gguf"}]).warnings
    assert [text for text in warned if text.startswith("gguf_rows: mlp_width 8")]
    assert not [
        text for text in plan(folder, {**step, "round_to": 32}, exports=[{"format": "gguf"}]).warnings if "rows" in text
    ]


def test_ranks_that_kernels_dislike_are_named_with_better_ones(tmp_path: Path) -> None:
    """SmolLM2's heads in small: 9 × 12 and 15 × 12 miss 32; with nine heads only 32 fits both."""
    folder = make_tiny_model(tmp_path / "in", "llama", heads=9, kv_heads=3, head_dim=64, hidden=36, intermediate=2048)
    note = next(text for text in plan(folder, {"modules": ALL, "sparsity": 0.25}).notes if "kernel_rows" in text)
    assert "heads × rank 432" in note
    assert "key/value heads) × rank 720" in note
    assert note.endswith("ranks that fit both: 32")
    assert not any("kernel_rows" in text for text in plan(folder, {"modules": ["mlp"]}).notes)


def test_the_plan_counts_the_bytes_of_exports(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", hidden=64, intermediate=96, head_dim=16)
    without = plan(folder, {"round_to": 32})
    for dtype, bits in (("f32", 32), ("bf16", 16), ("q8_0", 8.5)):
        more = plan(folder, {"round_to": 32}, exports=[{"format": "gguf", "dtype": dtype}])
        assert more.disk_bytes - without.disk_bytes == int(without.parameters_after * bits / 8)


def test_runtimes_that_load_reduced_attention_silently_wrong_are_named(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama", hidden=64, intermediate=96, head_dim=16)
    exports = [{"format": "gguf", "dtype": "f32"}]
    reduced = {one.runtime: one for one in plan(folder, {"modules": ALL}, exports=exports).runtimes}
    wrong = {name for name, one in reduced.items() if one.status == "silently_wrong"}
    assert wrong == {
        "llama.cpp (convert_hf_to_gguf.py)",
        "onnxruntime-genai",
        "transformers (gguf_file=exports/model-f32.gguf)",
    }
    assert reduced["llama.cpp"].command == "llama-server -m FOLDER/exports/model-f32.gguf"
    whole = plan(folder, {}, exports=exports).runtimes
    assert not [one for one in whole if one.status == "silently_wrong"]
    assert all(one.evidence for one in whole)
