"""Loads a model folder in a process of its own and reports what it computes, how fast, and in how much memory.

Run as a script, isolated (`python -I probe.py …`): a portable artifact must load where this project cannot be
imported, which the process makes sure of. The other layouts get `--project`, the folder of `compression.runtime`.
"""

import argparse
import ctypes
import json
import mmap
import runpy
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

PROMPT_TOKENS = 32
OURS = ("api_schemas", "compression", "job_store", "modepress", "preflight", "service", "workers")
PAGE_OUT = 21  # Linux's MADV_PAGEOUT: clean pages of a file leave memory; what is written nowhere else stays


def main() -> None:
    """Parse arguments, probe, write `<out>.json` and, with --logits, `<out>.safetensors`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path, help="safetensors file with `tokens` [1, n]")
    parser.add_argument("out", type=Path)
    parser.add_argument("--generate", type=int, default=0)
    parser.add_argument("--logits", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--project", type=Path)
    arguments = parser.parse_args()
    facts = probe(arguments)
    arguments.out.with_suffix(".json").write_text(json.dumps(facts))


def probe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load in the stored dtype, generate greedily, then run one forward pass in float32 for the comparison."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer, GenerationConfig

    torch.set_num_threads(arguments.threads)
    if arguments.project is None:
        hide_project()
    else:
        use_project(arguments.project)
    model, loading = _load(arguments.folder)
    problems = {
        name: sorted(map(str, loading[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    facts: dict[str, Any] = {"loader": type(model).__name__, "problems": {k: v for k, v in problems.items() if v}}
    model.eval()
    tokens = load_file(arguments.tokens)["tokens"]
    with torch.inference_mode():
        if arguments.generate:
            prompt = tokens[:, :PROMPT_TOKENS]
            for count in (2, arguments.generate):  # the first warms up
                settings = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
                started = time.perf_counter()
                written = model.generate(prompt, generation_config=settings)
                facts["tokens_per_second"] = count / (time.perf_counter() - started)
            tokenizer = AutoTokenizer.from_pretrained(arguments.folder, local_files_only=True, trust_remote_code=False)
            facts["greedy_text"] = tokenizer.decode(written[0, prompt.shape[1] :])
        facts["peak_memory_bytes"] = _peak_rss_bytes()
        if arguments.logits:
            if arguments.generate and _stays_codes(model):  # the kernels have rounded its scales to bfloat16 by now
                model, _ = _load(arguments.folder)
            logits = _logits(model.eval(), tokens)
            save_file({"logits": logits.contiguous()}, arguments.out.with_suffix(".safetensors"))
            facts["proof_memory_bytes"] = _peak_rss_bytes()
    return facts


def _load(folder: Path) -> Any:
    """The model in its stored dtype, and what the loader says of its tensors' names."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    loader = AutoModelForImageTextToText if "vision_config" in config.sub_configs else AutoModelForCausalLM
    return loader.from_pretrained(
        folder,
        dtype="auto",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )


def use_project(folder: Path) -> None:
    """Register the classes of layouts that stock transformers does not load."""
    sys.path.insert(0, str(folder))
    import compression.runtime  # noqa: F401 (registers the reduced families)


def hide_project() -> None:
    """Make importing this project fail in this process, also where it is installed beside torch."""
    for name in OURS:
        sys.modules[name] = None  # type: ignore[assignment]  # the import system raises ModuleNotFoundError


def _logits(model: Any, tokens: Any) -> Any:
    """Logits `[tokens, vocabulary]` in float32."""
    import torch
    from torch import nn

    if _stays_codes(model):  # what the codes stand for: kernels round inputs too, by how much depends on the CPU
        return nn.Module.float(model.dequantize(torch.float32))(tokens).logits[0]
    if getattr(model, "hf_quantizer", None) is not None:
        model(tokens[:, :1])  # packed weights are unpacked in the first pass, in their stored dtype
        return nn.Module.float(model)(tokens).logits[0]  # stock `.float()` refuses packed models, even then
    _widen_while_running(model)
    return model(tokens).logits[0]


def _stays_codes(model: Any) -> bool:
    """Whether its linears are bitsandbytes', which multiply with codes."""
    return bool(getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False))


def _widen_while_running(model: "nn.Module") -> None:
    """Compute in float32 from now on with one module's weights widened at a time: the others stay in their files.

    transformers maps weights of the stored dtype from the files, so memory does not grow with the model's depth.
    """
    import torch

    advise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None) if sys.platform == "linux" else None
    kept: dict[nn.Module, dict[str, nn.Parameter]] = {}

    def widen(module: "nn.Module", _inputs: Any) -> None:
        own = dict(module.named_parameters(recurse=False))
        kept[module] = {name: one for name, one in own.items() if one.is_floating_point()}
        for name, one in kept[module].items():
            setattr(module, name, torch.nn.Parameter(one.float(), requires_grad=False))

    def restore(module: "nn.Module", _inputs: Any, _output: Any) -> None:
        for name, one in kept.pop(module).items():
            setattr(module, name, one)
            if advise is not None:
                _page_out(advise, one)

    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.float())
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(widen)
            module.register_forward_hook(restore)


def _page_out(advise: Any, tensor: "Tensor") -> None:
    """Let the pages that lie wholly inside a tensor leave memory; advice, so a refusal changes nothing."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), PAGE_OUT)


def _peak_rss_bytes() -> int:
    """`compression.core.memory.peak_rss_bytes`, loaded by path: this process may not import the project."""
    namespace = runpy.run_path(str(Path(__file__).parent / "core" / "memory.py"))
    return int(namespace["peak_rss_bytes"]())


if __name__ == "__main__":
    main()
