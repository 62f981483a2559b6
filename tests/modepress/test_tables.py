"""Tables for people: a plan of two steps shows both."""

from pathlib import Path
from typing import Any

from rich.console import Console

from api_schemas.recipe import Recipe
from modepress.commands.plan_table import plan_table
from preflight.checkpoint import open_checkpoint
from preflight.plans import make_plan
from tests.tiny_composites import make_tiny_composite
from tests.tiny_models import make_tiny_model


def shown(folder: Path, *steps: dict[str, Any]) -> str:
    plan = make_plan(open_checkpoint(folder), Recipe.model_validate({"steps": steps}), model="tiny")
    console = Console(width=200)
    with console.capture() as captured:
        console.print(plan_table(plan))
    return captured.get()


def test_a_plan_names_each_step_and_what_it_does_to_the_bytes(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama", hidden=64, intermediate=256)
    gptq = {"method": "gptq", "group_size": 32}
    both = shown(folder, {"method": "modegpt", "sparsity": 0.3}, gptq)
    assert "step 1 of 2, modegpt: " in both
    assert "step 2 of 2, gptq: " in both
    assert "in mlp" in both
    alone = shown(folder, gptq)
    assert "every width stays" in alone
    assert "step 1" not in alone


def test_a_plan_names_the_parts_of_a_model_that_has_several(tmp_path: Path) -> None:
    step = {"method": "modegpt", "sparsity": 0.3}
    assert "parts:" not in shown(make_tiny_model(tmp_path / "text", intermediate=96), step)
    said = shown(make_tiny_composite(tmp_path / "m", intermediate=96), step)
    assert "parts: language 49.82 k parameters, projector 1.60 k parameters, vision 13.49 k parameters;" in said


def test_a_plan_lists_what_is_quantised_by_path_bits_and_bytes(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama", hidden=64, intermediate=256)
    said = shown(folder, {"method": "int8", "skip_modules": ["o_proj"]})
    assert "2 × model.layers.*.mlp.down_proj: 8 bits, 65.5 kB become 16.6 kB" in said
    assert "2 × model.layers.*.self_attn.o_proj: kept by 'o_proj', " in said
