"""Layout `portable` in unmodified transformers, in one process that cannot import this project, for all families.

The script below is all that runs there: it knows nothing of `compression.probe`, whose own isolation is tested too.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compression.probe import OURS
from compression.reload import PROBE
from preflight.families import known_families, table
from tests.compression.core.test_artifact import portable_walk, write
from tests.compression.walks import Walk, expected_logits, random_tokens, step, walk
from tests.tiny_models import make_tiny_model

REDUCED_ATTENTION = ("llama", "mistral", "qwen2", "granite", "smollm3", "gemma2", "mixtral")
SCRIPT = """
import json, sys
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
    assert type(model).__module__.startswith("transformers.models."), type(model)
    tokens = load_file(folder + ".tokens")["tokens"]
    with torch.inference_mode():
        logits = model(tokens).logits[0]
        written = model.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
        again = model(written).logits[0]
    save_file({"logits": logits, "written": written, "again": again}, folder + ".answer")
for name in json.loads(sys.argv[1]):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(name + " can be imported")
"""


def artifacts(root: Path) -> dict[str, tuple[Walk, Path]]:
    """A0 of every family, and A1 of those whose stock class takes smaller heads."""
    made = {}
    for family in known_families():
        folder = make_tiny_model(root / family, family)  # type: ignore[arg-type]
        done = walk(folder, step(layout="portable", sparsity=0.2, round_to=8, modules=["mlp"]), random_tokens(8, 32))
        made[f"A0 {family}"] = done, folder
        if family in REDUCED_ATTENTION:
            made[f"A1 {family}"] = portable_walk(folder), folder
    return made


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Walk, dict[str, torch.Tensor]]]:
    root = tmp_path_factory.mktemp("isolated")
    made, targets = artifacts(root), {}
    for name, (done, folder) in made.items():
        targets[name] = root / "out" / name.replace(" ", "-")
        write(done, folder, targets[name], "portable")
        save_file({"tokens": random_tokens(1, 40, seed=9)}, f"{targets[name]}.tokens")
    folders = [str(target) for target in targets.values()]
    command = [sys.executable, "-I", "-c", SCRIPT, json.dumps(OURS), *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: (made[name][0], load_file(f"{target}.answer")) for name, target in targets.items()}


@pytest.mark.parametrize(
    "name", [f"A0 {family}" for family in known_families()] + [f"A1 {family}" for family in REDUCED_ATTENTION]
)
def test_what_it_computes_there_is_what_was_solved(name: str, answers: Any) -> None:
    done, answer = answers[name]
    tokens = random_tokens(1, 40, seed=9)
    expected = expected_logits(done.model, done.method, done.store, tokens)
    torch.testing.assert_close(answer["logits"], expected, rtol=1e-4, atol=1e-4)
    width = done.method.shapes[0]
    assert width.mlp_width < done.method.size.mlp_width
    assert (width.query_key_rank < done.method.size.head_dim) is name.startswith("A1")
    # with a cache, token by token, it writes what it computes without one
    chosen = answer["again"][39:-1]
    chosen[:, 2] = -torch.inf  # min_new_tokens forbids the end
    assert answer["written"][0, 40:].tolist() == chosen.argmax(-1).tolist()


def test_the_list_of_families_with_free_heads_is_whole() -> None:
    free = {name for name in known_families() if table(name).head_dim_is_free and not table(name).qk_norm}
    assert {name for name in free if table(name).rotary_fraction is None} == set(REDUCED_ATTENTION)


def test_the_reload_proof_runs_where_this_project_cannot_be_imported(tmp_path: Path) -> None:
    code = f"import runpy; runpy.run_path({str(PROBE)!r})['hide_project'](); import compression.runtime"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "compression" in done.stderr.splitlines()[-1]
    assert "ModuleNotFoundError" in done.stderr.splitlines()[-1]
