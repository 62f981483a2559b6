"""What a GGUF file can express, and what llama.cpp makes of it: known before any weight is read.

Found by running llama.cpp 11434 on such files (`benchmarks/runtimes.py`) and by reading its `src/models/*.cpp`:

- `llama` has one MLP width and head size and multiplies rotary angles by `rope_freqs`; `deci` is the same with widths
  per block. `qwen2` and `qwen3` read no `rope_freqs`, so their frequencies must be the stock ones. `qwen2` loads
  attention only where heads × head size is the hidden size.
- rows whose length is no multiple of 32 cannot be quantised and stay in 16 bits; K-quants want 256.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preflight.tokenizer_files import FAST

BLOCK_ROW = 32  # weights that share a scale in Q8_0


@dataclass(frozen=True)
class GgufArchitecture:
    """How llama.cpp knows a family.

    Attributes:
        name: value of `general.architecture`.
        permuted: rotary pairs are neighbours in query and key, not halves of a head.
        rope_freqs: the graph divides angles by a stored tensor of factors.
        square: heads × head size must be the hidden size.
    """

    name: str
    permuted: bool
    rope_freqs: bool
    square: bool = False


ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", permuted=True, rope_freqs=True),
    "mistral": GgufArchitecture("llama", permuted=True, rope_freqs=True),
    "qwen2": GgufArchitecture("qwen2", permuted=False, rope_freqs=False, square=True),
    "qwen3": GgufArchitecture("qwen3", permuted=False, rope_freqs=False),
}
PER_BLOCK = GgufArchitecture("deci", permuted=True, rope_freqs=True)
PER_BLOCK_FAMILIES = ("llama", "mistral")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # regular expressions of tokenizer.json: llama.cpp's name for them
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
}


@dataclass(frozen=True)
class GgufTokenizer:
    """llama.cpp's names of a tokenizer's kind and of the way it splits a text first."""

    model: str
    pre: str


def gguf_tokenizer(folder: Path) -> GgufTokenizer | str:
    """The names that llama.cpp has for a folder's tokenizer, or why it has none.

    Known are byte-level BPE with four ways to split a text (recognised by what tokenizer.json says, not by a guess),
    and SentencePiece with its tokenizer.model.
    """
    path = folder / FAST
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            return GgufTokenizer("llama", "default")
        return "there is no tokenizer.json or tokenizer.model"
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        return f"tokenizer.json is of type {model.get('type')!r}, not BPE"
    if model.get("byte_fallback"):
        if (folder / "tokenizer.model").is_file():
            return GgufTokenizer("llama", "default")
        return "it falls back to bytes, and the scores that llama.cpp needs are only in a tokenizer.model"
    pre = _split_name(content.get("pre_tokenizer"))
    if pre is None:
        return "tokenizer.json splits a text in a way that llama.cpp is not known to share"
    if bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
        return f"ignore_merges is {bool(model.get('ignore_merges'))}, which llama.cpp's {pre!r} does not share"
    normalizer = content.get("normalizer")
    if normalizer is not None and not (pre == "qwen2" and normalizer.get("type") == "NFC"):
        return f"it normalises texts ({normalizer.get('type')}), which llama.cpp does not do"
    return GgufTokenizer("gpt2", pre)


def _split_name(pre: Any) -> str | None:
    """llama.cpp's name of a pre-tokenizer, or None where it has none that is known here."""
    if not isinstance(pre, dict):
        return None
    steps = pre.get("pretokenizers") if pre.get("type") == "Sequence" else [pre]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    by_expression = steps[-1].get("use_regex", True)
    first = steps[:-1]
    if not first:
        return "gpt-2" if by_expression else None
    if len(first) > 1:
        return None
    if first[0].get("type") == "Digits":
        return "smollm" if by_expression and first[0].get("individual_digits") else None
    if first[0].get("type") != "Split" or by_expression or first[0].get("behavior") != "Isolated":
        return None
    return SPLITS.get((first[0].get("pattern") or {}).get("Regex", ""))


def architecture_for(family: str, layout: str) -> GgufArchitecture | None:
    """What llama.cpp calls models of this family in this layout, or None where it knows none."""
    if layout == "nemotron":
        return PER_BLOCK if family in PER_BLOCK_FAMILIES else None
    return ARCHITECTURES.get(family) if layout == "portable" else None
