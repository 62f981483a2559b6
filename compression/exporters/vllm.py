"""A configuration folder under which vLLM's native class DeciLM loads the weights of layout `nemotron`.

vLLM needs the entries of `block_configs` as objects, which only a configuration class can make of JSON: one of 30 lines
is written beside config.json, for vLLM to import under `--trust-remote-code`. This project never imports it from there.
"""

import json
import shutil
from pathlib import Path

from api_schemas.errors import InvalidRecipe
from api_schemas.reports import ExportReport
from compression.runtime.nemotron import MODEL_TYPE

CLASS_FILE = Path(__file__).with_name("configuration_decilm.py")
CLASS_NAME = "DeciLMConfig"


def write_vllm(folder: Path, target: Path) -> ExportReport:
    """Write config.json and its class into the folder `target`.

    Args:
        folder: an artifact in layout `nemotron`.
        target: the folder for `--hf-config-path`; replaced when it exists.

    Raises:
        InvalidRecipe: `vllm_layout`: another layout.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != MODEL_TYPE:
        raise InvalidRecipe("vllm_layout", "export vllm: it is for layout 'nemotron' alone; leave it out", "exports")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    config["auto_map"] = {"AutoConfig": f"{CLASS_FILE.stem}.{CLASS_NAME}"}
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copyfile(CLASS_FILE, target / CLASS_FILE.name)
    return ExportReport(
        format="vllm",
        target=f"exports/{target.name}",
        bytes=sum(path.stat().st_size for path in target.iterdir()),
        architecture=config["architectures"][0],
        tensors={},
        relative_error=0.0,
    )
