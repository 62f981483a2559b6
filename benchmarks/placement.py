"""What rounding costs o_proj for each place of the singular values, on a real model.

    python benchmarks/placement.py MODEL --calibration FILE [--blocks 6] [--rank 32] [--bits 4] [--group-size 32]

Per block: value and output are narrowed to the rank (mode reference, dense statistics), o_proj is rounded to nearest
and by GPTQ with each place, and ‖X(W−Ŵ)ᵀ‖/‖XWᵀ‖ is printed; the means come last.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from api_schemas.methods import GptqConfig
from compression.core.blockwise import chunks, run_block_
from compression.core.linear_walk import relative_error
from compression.core.statistics import BlockStatistics, RunningGram
from compression.core.streamed_model import StreamedModel
from compression.core.taps import inputs_of
from compression.methods.gptq import gptq
from compression.methods.modegpt_decompositions import value_factors, value_output
from compression.methods.round_to_nearest import round_to_nearest
from preflight.checkpoint import open_checkpoint
from preflight.families import resolve

PLACES = ("output", "balanced", "value")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192)
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    asked = arguments()
    checkpoint = open_checkpoint(asked.model)
    family = resolve(checkpoint.config)
    model = StreamedModel(asked.model, family, checkpoint.tensors)
    tokenizer = AutoTokenizer.from_pretrained(asked.model, local_files_only=True)
    ids = tokenizer(asked.calibration.read_text(), add_special_tokens=False)["input_ids"][: asked.tokens]
    hidden = model.embed(torch.tensor(ids).reshape(-1, 1024))
    config = GptqConfig(method="gptq", bits=asked.bits, group_size=asked.group_size)
    totals = torch.zeros(len(PLACES), 2, dtype=torch.float64)
    for index in range(asked.blocks):
        block = model.block(index, model.block_state(index))
        statistics = BlockStatistics(family, model.size)
        mixed = RunningGram(1, model.size.heads * model.size.head_dim)
        with statistics.watching(block), inputs_of(block, {"mixed": family.attention.output}) as taken:
            for part in chunks(hidden):
                model.forward(block, hidden[part], index)
                mixed.add(taken["mixed"])
        of_heads, of_all = statistics.value.mean(), mixed.mean()[0]
        errors = torch.tensor(
            [place_errors(model, index, of_heads, of_all, place, asked.rank, config) for place in PLACES]
        )
        totals += errors
        print(index, errors.tolist(), flush=True)
        run_block_(model, block, index, hidden)
    for place, (near, by_gptq) in zip(PLACES, (totals / asked.blocks).tolist(), strict=True):
        print(f"{place}: round_to_nearest {near:.4f}, gptq {by_gptq:.4f}")


def place_errors(
    model: StreamedModel,
    index: int,
    of_heads: torch.Tensor,
    of_all: torch.Tensor,
    place: str,
    rank: int,
    config: GptqConfig,
) -> list[float]:
    size = model.size
    weight = model.block_state(index)[f"{model.family.attention.output}.weight"].double()
    heads = weight.reshape(size.hidden, size.kv_heads, size.group, size.head_dim)
    maps, outputs = [], []
    for head, G in enumerate(of_heads):
        solved = value_output(G, heads[:, head].transpose(0, 1), rank)
        factors = value_factors(solved.singular_values, place)
        maps += [solved.basis * factors] * size.group
        outputs += list(solved.output / factors)
    output = torch.cat(outputs, dim=1)
    mapping = torch.block_diag(*maps)
    correlation = mapping.T @ of_all @ mapping
    near = round_to_nearest(output, config.bits, config.group_size, torch.bfloat16)
    by_gptq = gptq(output, correlation, config, torch.bfloat16).quantized
    return [relative_error(output, one.dequantized().double(), correlation) for one in (near, by_gptq)]


if __name__ == "__main__":
    main()
