"""Tiny models with a real tokenizer and chat template, the same bytes on every run. Written by transformers itself."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

ModelType = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "granite",
    "smollm3",
    "phi3",
    "phi",
    "opt",
    "gpt2",
    "gpt_neox",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "qwen3_moe",
]
# What makes a family itself, away from the values that would hide a mistake.
PECULIARITIES: dict[str, dict[str, Any]] = {
    "granite": {
        "attention_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {"resid_pdrop": 0.0},
    "phi": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}},
    "gemma2": {
        "query_pre_attn_scalar": 5,
        "sliding_window": 6,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.5,
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 5,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    },
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
}
RENAMED: dict[str, dict[str, str]] = {
    "opt": {"intermediate_size": "ffn_dim"},
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
    },
    "qwen3_moe": {"intermediate_size": "moe_intermediate_size"},
}
MULTI_HEAD_ONLY = ("opt", "gpt2", "gpt_neox")  # no grouped queries, and head_dim is hidden / heads

PROSE = (
    "The quick brown fox jumps over the lazy dog while seven wizards watch from the hill. "
    "A model that is smaller than before should still answer the question it was asked. "
    "In the morning the river was quiet, and the boats that had waited all night went out again. "
    "Every number in the table was measured; none of them was guessed. What is the capital of France? "
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tiny_tokenizer(folder: Path, *, chat_template: bool = True) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer of 384 tokens on `PROSE` (any text can be encoded) and save it in `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=512,
    )
    if chat_template:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return fast


def make_tiny_model(
    folder: Path,
    model_type: ModelType = "llama",
    *,
    tied: bool = False,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    hidden: int = 32,
    intermediate: int = 48,
    layers: int = 2,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: bool = True,
    chat_template: bool = True,
    max_shard_size: str = "1GB",
    **more: Any,
) -> Path:
    """Write a random model of `model_type` with its tokenizer into `folder`, and return the folder.

    Args:
        folder: where to write; made when absent.
        model_type: which of transformers' architectures.
        tied: whether the head is the embedding.
        heads: query heads per block.
        kv_heads: key and value heads per block; as many as query heads in `MULTI_HEAD_ONLY`.
        head_dim: channels per head; `heads * head_dim` may differ from `hidden` (not for qwen2, phi3 and
            `MULTI_HEAD_ONLY`).
        hidden: width of the residual stream.
        intermediate: width inside the MLP.
        layers: decoder blocks.
        bias: biases on the four attention projections, where the architecture lets a configuration choose.
        dtype: of all weights.
        seed: of the weights; the caller's random state is untouched.
        tokenizer: whether to save one.
        chat_template: whether that tokenizer gets one.
        max_shard_size: small values such as "20KB" make several shards and an index.
        more: further configuration values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if bias and model_type == "mistral":
        raise ValueError("mistral has no biases")
    vocabulary = len(make_tiny_tokenizer(folder, chat_template=chat_template)) if tokenizer else 384
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 512,
    }
    if model_type not in MULTI_HEAD_ONLY:
        sizes |= {"num_key_value_heads": kv_heads, "head_dim": head_dim}
    names = RENAMED.get(model_type, {})
    config = AutoConfig.for_model(
        model_type,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **{"enable_bias" if model_type == "opt" else "attention_bias": bias},
        **{names.get(name, name): value for name, value in sizes.items()},
        **{**PECULIARITIES.get(model_type, {}), **more},
    )
    random_model(config, dtype, seed).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def random_model(config: object, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Build the model of a configuration with weights, norms and biases all away from their trivial start values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                spread = 0.1 if parameter.ndim == 1 else 0.2
                scales = name.endswith("weight") and ("norm" in name or ".ln_" in name)
                parameter.normal_(1.0 if scales else 0.0, spread)
    return model.to(dtype).eval()


# What a model that has learned something cannot survive: for tests of the quality gate.
RUINOUS_STEP = {"method": "modegpt", "mode": "reference", "layout": "full", "sparsity": 0.75, "round_to": 1}


def teach(folder: Path) -> None:
    """Train a tiny model a little on real prose, so that there is something to lose."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("\n".join(list(topics.values())[:40]), add_special_tokens=False)["input_ids"]
    windows = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        batch = windows[torch.randint(len(windows), (8,), generator=generator)]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
