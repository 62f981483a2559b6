"""Which runtimes load a result, how, and how that is known.

`verified` rests on something of this repository that ran the runtime: a test, the job's own reload proof, or
`benchmarks/runtimes.py`, whose table with versions and date is benchmarks/README.md. Its subject was Llama; the same
layout of another family is `believed`. Everything that loads without an error and computes another model is named.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from api_schemas.exports import ExportConfig
from api_schemas.exports.gguf import GgufExport
from api_schemas.plans import BlockShape, RuntimeSupport
from preflight.families import Dimensions, Family
from preflight.gguf_rules import ARCHITECTURES
from preflight.rotary import rope_type
from preflight.rows import nf4_misfits

BENCHMARK = "benchmarks/runtimes.py on SmolLM2-135M-Instruct; table in benchmarks/README.md"
RELOAD = "this job's reload proof (report.reload), in a process that cannot import this project"
OURS = "this job's reload proof (report.reload); tests/workers/inference"
SOURCES = "read in its sources, not run here"
TRIED = "run once by hand with 0.18.0, no test"
PROBED_FAMILIES = ("llama",)  # families that the benchmark ran


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


def _row(
    runtime: str, status: str, reason: str, command: str | None = None, evidence: str | None = None
) -> RuntimeSupport:
    return RuntimeSupport.model_validate(
        {"runtime": runtime, "status": status, "reason": reason, "command": command, "evidence": evidence}
    )


def _ours() -> RuntimeSupport:
    return _row("modepress", "verified", "the service loads it by its id", "modepress chat MODEL", OURS)


def _portable(family: Family, size: Dimensions, shapes: Sequence[BlockShape]) -> Iterator[RuntimeSupport]:
    stock, tested = f"{family.architecture}, no remote code", family.name in PROBED_FAMILIES
    reduced = shapes[0].query_key_rank != size.head_dim
    yield _ours()
    yield _row("transformers", "verified", stock, "transformers serve FOLDER", RELOAD)
    command = "python -m vllm.entrypoints.openai.api_server --model FOLDER"
    status, evidence = ("verified", BENCHMARK) if tested else ("believed", SOURCES)
    why = "head_dim and longrope factors are read" if reduced else "uniform widths are ordinary configuration values"
    yield _row("vllm", status, why, command, evidence)
    if family.name in ARCHITECTURES and reduced:
        wrong = "drops the rotary factors without a word; export gguf writes them"
        evidence = "run with llama.cpp 11434: logits differ by 45, 2 to 18 % same first choice"
        yield _row("llama.cpp (convert_hf_to_gguf.py)", "silently_wrong", f"it {wrong}", None, evidence)
    elif family.name in ARCHITECTURES:
        convert = "python convert_hf_to_gguf.py FOLDER, or export gguf"
        yield _row(
            "llama.cpp (convert_hf_to_gguf.py)", "believed", why, convert, "run once by hand with 11434, no test"
        )
    if family.name in PROBED_FAMILIES:
        yield _onnx(reduced)
    yield _nf4(size, shapes)


def _onnx(reduced: bool) -> RuntimeSupport:
    if reduced:
        wrong = "its builder ignores the longrope factors of a Llama without a word"
        return _row("onnxruntime-genai", "silently_wrong", wrong, None, f"{TRIED}: logits differ by 35")
    build = "python -m onnxruntime_genai.models.builder -m FOLDER -o OUT -p fp32 -e cpu"
    return _row("onnxruntime-genai", "believed", "uniform widths are ordinary configuration values", build, TRIED)


def _nf4(size: Dimensions, shapes: Sequence[BlockShape]) -> RuntimeSupport:
    name, evidence = "bitsandbytes nf4 on CPU", "run once by hand with 0.50.2, no test"
    odd = nf4_misfits(size, shapes)
    if odd:
        why = f"its packing does not fit {', '.join(odd)}; it saves, then fails at the first forward"
        return _row(name, "refused", why, None, evidence)
    return _row(name, "believed", "all widths fit its packing", None, evidence)


def _nemotron(family: Family, size: Dimensions, shapes: Sequence[BlockShape]) -> Iterator[RuntimeSupport]:
    del size, shapes
    yield _ours()
    no_class = "no stock class has MLP widths per block"
    yield _row(
        "transformers", "refused", no_class, "import compression.runtime first", "tests/compression/test_nemotron.py"
    )
    yield _row(
        "llama.cpp (convert_hf_to_gguf.py)", "refused", "it asks for ffn_mult; export gguf instead", None, SOURCES
    )
    yield _row(
        "onnxruntime-genai", "refused", f"its builder has no {family.name} with MLP widths per block", None, SOURCES
    )


def _full(family: Family, size: Dimensions, shapes: Sequence[BlockShape]) -> Iterator[RuntimeSupport]:
    del family, size, shapes
    yield _ours()
    refused = "no stock class has widths per block and rotary pairs per head"
    evidence = "tests/compression/test_reload.py"
    yield _row("transformers", "refused", refused, "import compression.runtime first", evidence)
    for runtime in ("vllm", "llama.cpp", "onnxruntime-genai"):
        yield _row(runtime, "refused", refused, None, SOURCES)


def _exported(
    family: Family, layout: str, exports: Sequence[ExportConfig], *, stock_angles: bool
) -> Iterator[RuntimeSupport]:
    """What can be done with the files under exports/."""
    status, evidence = ("verified", BENCHMARK) if family.name in PROBED_FAMILIES else ("believed", SOURCES)
    for export in exports:
        if isinstance(export, GgufExport):
            command = f"llama-server -m FOLDER/{export.target}"
            yield _row("llama.cpp", status, f"{export.target}, written with rotary factors", command, evidence)
            yield _gguf_in_transformers(layout, export.target, stock_angles=stock_angles)
        else:
            command = (
                "python -m vllm.entrypoints.openai.api_server --model FOLDER "
                f"--hf-config-path FOLDER/{export.target} --trust-remote-code"
            )
            why = "its own DeciLM class; the code it is asked to trust is a configuration class of 30 lines"
            yield _row("vllm", status, why, command, evidence)


def _gguf_in_transformers(layout: str, target: str, *, stock_angles: bool) -> RuntimeSupport:
    name, test = f"transformers (gguf_file={target})", "tests/compression/exporters/test_gguf.py"
    if layout == "nemotron":
        return _row(name, "refused", "it knows no architecture deci", None, test)
    if stock_angles:
        command = f"AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file='{target}')"
        return _row(name, "verified", "it unpacks the codes to floats", command, test)
    wrong = "it drops rope_freqs without a word"
    return _row(name, "silently_wrong", wrong, None, test)
