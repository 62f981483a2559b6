"""Layout `nemotron`: MLP widths per block, Llama's own attention, and the foreign forms of it."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

import compression.runtime  # noqa: F401 (registers the class)
from api_schemas.errors import InvalidCheckpoint, InvalidRecipe, ModepressError
from compression.exporters.vllm import CLASS_FILE, write_vllm
from compression.runtime.nemotron import block_configs, mlp_widths
from preflight.checkpoint import describe, open_checkpoint
from preflight.folder_scan import OUR_CODE
from preflight.plans import make_plan
from tests.compression.test_pipeline import recipe, run
from tests.compression.walks import step
from tests.tiny_models import make_tiny_model

SIZES: dict[str, Any] = {"hidden": 64, "intermediate": 160, "head_dim": 16, "layers": 3}
NEMOTRON = {"layout": "nemotron", "round_to": 8}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A tiny model with three different widths, exported to everything it can be exported to."""
    root = tmp_path_factory.mktemp("nemotron")
    folder = make_tiny_model(root / "in", "llama", tied=True, **SIZES)
    exports = [{"format": "gguf", "dtype": "f32"}, {"format": "gguf"}, {"format": "vllm"}]
    return root / "out", run(folder, root / "out", recipe(NEMOTRON, exports=exports))


def test_widths_differ_by_block_and_the_budget_is_met(artifact: tuple[Path, Any]) -> None:
    folder, report = artifact
    widths = [shape.mlp_width for shape in report.shapes]
    assert len(set(widths)) > 1
    assert {(shape.query_key_rank, shape.value_output_rank) for shape in report.shapes} == {(16, 16)}
    config = json.loads((folder / "config.json").read_text())
    assert mlp_widths(config["block_configs"]) == tuple(widths)
    assert (config["model_type"], "auto_map" in config) == ("nemotron-nas", False)
    assert report.block_parameters.after / report.block_parameters.before == pytest.approx(0.7, abs=0.02)
    assert report.reload.max_logit_difference <= report.reload.tolerance
    assert not any("rotary_pairs" in name for name in open_checkpoint(folder).tensors)  # vLLM knows no such tensor


def test_every_file_is_in_the_manifest_and_the_folder_is_a_sound_model(artifact: tuple[Path, Any]) -> None:
    folder, report = artifact
    manifest = json.loads((folder / "modepress.json").read_text())["files"]
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert manifest.keys() == on_disk - {"modepress.json"} == report.files.keys()
    for name, digest in manifest.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    facts = describe(open_checkpoint(folder))
    assert not [warning for warning in facts.warnings if "exports/" in warning]
    assert [export.target for export in report.exports] == [
        "exports/model-f32.gguf",
        "exports/model-q8_0.gguf",
        "exports/vllm",
    ]


def test_serve_json_says_how_and_on_what_evidence(artifact: tuple[Path, Any]) -> None:
    rows = json.loads((artifact[0] / "serve.json").read_text())["runtimes"]
    by_name = {row["runtime"]: row for row in rows}
    assert by_name["vllm"]["status"] == "verified"
    ours = {row["command"].split()[-1]: row["status"] for row in rows if row["runtime"] == "llama.cpp"}
    assert ours == {
        "FOLDER/exports/model-f32.gguf": "verified",
        "FOLDER/exports/model-q8_0.gguf": "believed",  # the recorded runs are of float32 files
    }
    assert "--hf-config-path FOLDER/exports/vllm" in by_name["vllm"]["command"]
    assert by_name["transformers"]["status"] == "refused"
    assert all(row["evidence"] for row in rows)


def test_the_self_test_is_what_the_artifact_computes(artifact: tuple[Path, Any]) -> None:
    folder, _ = artifact
    asked = json.loads((folder / "exports" / "self_test.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([asked["tokens"]])).logits[0]
    assert logits.argmax(-1).tolist() == asked["next"]
    torch.testing.assert_close(logits.max(-1).values, torch.tensor(asked["logit"]), rtol=0, atol=1e-3)


def test_stock_transformers_refuses_it(artifact: tuple[Path, Any]) -> None:
    """What serve.json says of it, in a process that cannot import this project."""
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-I", "-c", code, artifact[0]], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "nemotron-nas" in done.stderr


def test_the_gguf_has_one_width_per_block(artifact: tuple[Path, Any]) -> None:
    folder, report = artifact
    reader = GGUFReader(folder / "exports" / "model-f32.gguf")
    keys = {key: reader.get_field(f"deci.{key}") for key in ("feed_forward_length", "attention.head_count_kv")}
    assert list(keys["feed_forward_length"].contents()) == [shape.mlp_width for shape in report.shapes]
    assert list(keys["attention.head_count_kv"].contents()) == [2, 2, 2]
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert [shapes[f"blk.{n}.ffn_up.weight"][1] for n in range(3)] == [shape.mlp_width for shape in report.shapes]
    with pytest.raises(ValueError, match="deci"):
        AutoModelForCausalLM.from_pretrained(folder / "exports", gguf_file="model-f32.gguf")


def test_vllms_class_gets_objects_and_gives_json_back(artifact: tuple[Path, Any]) -> None:
    """The written class is the one of this repository, byte for byte; here it is imported from the repository."""
    from compression.exporters.configuration_decilm import DeciLMConfig

    folder, report = artifact
    written = folder / "exports" / "vllm"
    assert (written / CLASS_FILE.name).read_bytes() == CLASS_FILE.read_bytes()
    settings = json.loads((written / "config.json").read_text())
    assert settings["auto_map"] == {"AutoConfig": "configuration_decilm.DeciLMConfig"}
    config = DeciLMConfig(**{key: said for key, said in settings.items() if key != "auto_map"})
    assert [block.ffn.intermediate_size for block in config.block_configs] == [s.mlp_width for s in report.shapes]
    assert not any(block.attention.no_op for block in config.block_configs)
    assert json.loads(config.to_json_string(use_diff=False))["block_configs"] == settings["block_configs"]


def test_only_the_very_file_of_ours_may_lie_in_an_artifact(artifact: tuple[Path, Any]) -> None:
    folder, _ = artifact
    name = "exports/vllm/configuration_decilm.py"
    assert hashlib.sha256(CLASS_FILE.read_bytes()).hexdigest() in OUR_CODE[name]
    original = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(original + b"\nimport os\n")
        with pytest.raises(InvalidCheckpoint) as caught:
            open_checkpoint(folder)
        assert caught.value.code == "remote_code_refused"
    finally:
        (folder / name).write_bytes(original)
    other = folder / "configuration_decilm.py"
    other.write_bytes(original)
    with pytest.raises(InvalidCheckpoint):
        open_checkpoint(folder)
    other.unlink()


def test_blocks_that_this_form_allows_and_we_do_not_make_are_refused() -> None:
    good = block_configs([8, 16], 2)
    assert mlp_widths(good) == (8, 16)
    for part in ("attention", "ffn"):
        for key in ("no_op", "replace_with_linear"):
            bad = block_configs([8, 16], 2)
            bad[1][part][key] = True
            with pytest.raises(ValueError, match=r"block_configs\[1\]"):
                mlp_widths(bad)


def test_attention_cannot_be_reduced_in_this_layout() -> None:
    with pytest.raises(ValidationError, match=r"modules must be \['mlp'\]"):
        step(layout="nemotron", modules=["mlp", "value_output"])


@pytest.mark.parametrize(
    ("kind", "settings", "layout", "exports", "code"),
    [
        ("qwen2", {}, "nemotron", [], "nemotron_family"),
        ("mistral", {"sliding_window": 16}, "nemotron", [], "nemotron_family"),
        ("llama", {}, "full", [{"format": "gguf"}], "gguf_family"),
        ("llama", {}, "full", [{"format": "vllm"}], "vllm_layout"),
        ("llama", {}, "portable", [{"format": "vllm"}], "vllm_layout"),
        ("gemma2", {}, "portable", [{"format": "gguf"}], "gguf_family"),
        ("llama", {"hidden_act": "gelu"}, "portable", [{"format": "gguf"}], "gguf_activation"),
    ],
)
def test_the_plan_refuses_what_a_job_could_not_finish(
    tmp_path: Path, kind: Any, settings: Any, layout: str, exports: Any, code: str
) -> None:
    folder = make_tiny_model(tmp_path / "in", kind, **settings)
    asked = recipe({"layout": layout, "mode": "reference", "round_to": 8}, exports=exports)
    plan = make_plan(open_checkpoint(folder), asked, model="tiny")
    assert [blocker.code for blocker in plan.blockers] == [code]
    with pytest.raises(ModepressError) as caught:
        run(folder, tmp_path / "out", asked)
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()


def test_reduced_attention_of_qwen2_cannot_become_a_gguf(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "qwen2", **SIZES)
    asked = recipe({"modules": ["mlp", "query_key", "value_output"], "round_to": 8}, exports=[{"format": "gguf"}])
    plan = make_plan(open_checkpoint(folder), asked, model="tiny")
    assert [(blocker.code, blocker.param) for blocker in plan.blockers] == [("gguf_rotary", "recipe.exports.0")]


def test_an_export_named_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match="would be written twice"):
        recipe(exports=[{"format": "gguf"}, {"format": "gguf", "dtype": "q8_0"}])


def test_the_vllm_export_of_another_layout_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "in", "llama")
    with pytest.raises(InvalidRecipe) as caught:
        write_vllm(folder, tmp_path / "vllm")
    assert caught.value.code == "vllm_layout"


def test_influence_never_asks_a_block_for_more_than_its_mlp_holds(tmp_path: Path) -> None:
    """Four idle blocks would lose 0.8 of their parameters each; their MLPs hold less than that."""
    folder = make_tiny_model(tmp_path / "in", "llama", **{**SIZES, "head_dim": 32, "layers": 4})
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for block in model.model.layers[1:]:
            block.mlp.down_proj.weight *= 1e-3
            block.self_attn.o_proj.weight *= 1e-3
    model.save_pretrained(folder)
    step = {**NEMOTRON, "mode": "reference", "allocation": "block_influence", "sparsity": 0.4, "temperature": 0.1}
    report = run(folder, tmp_path / "out", recipe(step))
    assert report.shapes[0].mlp_width > 140
    assert max(shape.mlp_width for shape in report.shapes[1:]) < 80
    assert report.block_parameters.after / report.block_parameters.before == pytest.approx(0.6, abs=0.01)
