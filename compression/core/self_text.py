"""Calibration text that the model writes itself, for when its own data cannot leave its owner."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

from compression.core.timeline import span

ROW_TOKENS = 256
ROWS_AT_ONCE = 8


def writer(folder: Path, tokenizer: Any, seed: int, *, composite: bool) -> Callable[[int], list[str]]:
    """Return a function that samples rows of text from the model until they hold the tokens asked for.

    Args:
        folder: the original model.
        composite: whether its decoder is one part of several.
        tokenizer: its tokenizer; sampling starts at its first special token, or at token 0 where it has none.
        seed: of the sampling; the caller's generator is left as it was.
    """

    def write(tokens: int) -> list[str]:
        import compression.runtime  # noqa: F401 (registers the reduced families)

        loader = AutoModelForImageTextToText if composite else AutoModelForCausalLM
        model = loader.from_pretrained(
            folder, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()
        start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0)
        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, max_new_tokens=ROW_TOKENS, pad_token_id=start
        )
        rows: list[str] = []
        held = 0
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(seed)
            while held < tokens:
                with span("load", "writing text"):
                    written = model.generate(torch.full((ROWS_AT_ONCE, 1), start), generation_config=settings)
                for row in written[:, 1:]:
                    rows.append(tokenizer.decode(row, skip_special_tokens=True))
                    held += max(1, len(tokenizer(rows[-1], add_special_tokens=False)["input_ids"]))
        return rows

    return write
