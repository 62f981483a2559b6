"""Mixed precision by measured error: each linear gets 16, 8 or 4 bits, so that all fit and the outputs move least.

TinyGPT-V (Yuan et al., arXiv 2312.16862) fits an 8 GB device by loading its language model in LLM.int8, all linears
alike. Here the bits are chosen: for each linear the error of its outputs is measured at each number of bits, with its
own inputs rounded as the kernels will round them, and the bytes are spent where a byte takes away most error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from api_schemas.methods.tinygptv import TinygptvConfig
from compression.core.budget import PriceList, spend
from compression.core.int8_rows import quantize_rows, rounded_inputs
from compression.core.linear_walk import LinearMethod
from compression.core.normal_float import quantize_normal
from compression.core.protocols import Streamed
from compression.methods.int8 import Int8
from compression.methods.nf4 import Nf4
from preflight.code_budget import KEPT, CodeBudget
from preflight.quantized_linears import linear_groups


@dataclass(frozen=True)
class Chosen:
    """Bits of every stored linear by its path, and of the vision tower's."""

    bits: Mapping[str, int]
    tower: int


class Tinygptv:
    """Which method each linear gets."""

    stage: ClassVar[str] = "quantize"

    def __init__(self, config: TinygptvConfig) -> None:
        """Take the recipe's step."""
        self.methods: dict[int, LinearMethod] = {8: Int8(config.int8), 4: Nf4(config.nf4)}

    def of(self, budget: CodeBudget, chosen: Chosen) -> dict[tuple[int, str], LinearMethod | None]:
        """The method of each canonical linear by its block; None where it stays."""
        return {
            (one.block, part): self.methods.get(chosen.bits[one.path]) for one in budget.linears for part in one.parts
        }


@torch.inference_mode()
def output_errors(
    model: Streamed, step: TinygptvConfig, hidden: Tensor, index: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Measure one block's linears on the inputs that they have in the unchanged model.

    Args:
        model: what the step starts from.
        step: block size and outlier threshold.
        hidden: `[windows, tokens, hidden]` inputs of the block.
        index: number of the block.

    Returns:
        For each canonical linear `[‖y‖², ‖y − ŷ₈‖², ‖y − ŷ₄‖²]` in float64 (the last infinite where runs do not divide
        its inputs), and the block's outputs.
    """
    state = model.block_state(index)
    block = model.block(index, state)
    seen: dict[str, Tensor] = {}
    names = [linear for group in linear_groups(model.family, model.size) for linear in group]
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _module, inputs, name=name: seen.__setitem__(name, inputs[0].detach())
        )
        for name in names
    ]
    try:
        output = model.forward(block, hidden, index)
    finally:
        for handle in handles:
            handle.remove()
    measured = {}
    for name in names:
        module = block.get_submodule(name)
        assert isinstance(module, nn.Linear)  # noqa: S101 (canonical blocks have no other)
        measured[name] = _errors(module.weight, state[f"{name}.weight"].dtype, seen.get(name), step)
    return measured, output


def _errors(weight: Tensor, dtype: torch.dtype, inputs: Tensor | None, step: TinygptvConfig) -> Tensor:
    if inputs is None or not inputs.numel():  # an expert that no token reached: its weights are all there is to compare
        inputs = torch.eye(weight.shape[1])
    outputs = inputs @ weight.T
    eight = rounded_inputs(inputs, step.outlier_threshold) @ quantize_rows(weight).dequantized().T
    found = [outputs.double().square().sum(), (eight - outputs).double().square().sum()]
    if weight.shape[1] % step.nf4.block_size:
        return torch.stack([*found, torch.tensor(torch.inf, dtype=torch.float64)])
    four = quantize_normal(
        weight, step.nf4.block_size, dtype if dtype is not torch.float64 else torch.float32, double=False
    )
    return torch.stack([*found, (inputs @ four.dequantized().float().T - outputs).double().square().sum()])


def squared_errors(budget: CodeBudget, measured: Sequence[Mapping[str, Tensor]]) -> dict[str, dict[int, float]]:
    """‖y − ŷ‖²/‖y‖² of every stored linear at 16, 8 and 4 bits; outputs of a fused one's parts are side by side."""
    found = {}
    for one in budget.linears:
        whole, eight, four = sum(measured[one.block][part] for part in one.parts).tolist()  # type: ignore[union-attr]
        found[one.path] = {KEPT: 0.0, 8: eight / max(whole, 1e-300), 4: four / max(whole, 1e-300)}
    return found


def choose(budget: CodeBudget, errors: Mapping[str, Mapping[int, float]], tower_error: float) -> Chosen:
    """The bits under which the summed squared errors are least and the weights fit.

    Args:
        budget: what may be chosen, and what it must come to.
        errors: ‖y − ŷ‖²/‖y‖² by path and bits.
        tower_error: the same of the vision tower at 8 bits, weights for outputs.
    """
    best: tuple[float, Chosen] | None = None
    for base in budget.bases:
        least = budget.total(*budget.least(base))
        if budget.allowed is not None and least > budget.allowed:
            continue
        chosen = Chosen(*budget.least(base)) if budget.allowed is None else _spend(budget, errors, tower_error, base)
        lost = sum(errors[path][bits] for path, bits in chosen.bits.items())
        lost += tower_error * len(budget.tower) if chosen.tower != KEPT else 0.0
        if best is None or lost < best[0]:
            best = (lost, chosen)
    if best is None:
        raise ValueError("the budget is below what the fewest bits take; a plan refuses that")
    return best[1]


def _spend(budget: CodeBudget, errors: Mapping[str, Mapping[int, float]], tower_error: float, base: int) -> Chosen:
    lists = []
    for one in budget.linears:
        options = budget.options(one, base)
        plain = budget.bytes_of(one, KEPT)
        saved = tuple(plain - budget.bytes_of(one, bits) for bits in options)
        lists.append(PriceList(options, saved, tuple(errors[one.path][bits] for bits in options)))
    tower = budget.tower_options(base)
    saved = tuple(budget.tower_bytes(KEPT) - budget.tower_bytes(bits) for bits in tower)
    lists.append(
        PriceList(tower, saved, tuple(0.0 if bits == KEPT else tower_error * len(budget.tower) for bits in tower))
    )
    assert budget.allowed is not None  # noqa: S101 (the caller asked)
    *bits, tower_bits = spend(lists, max(0, budget.plain - budget.allowed))
    return Chosen({one.path: at for one, at in zip(budget.linears, bits, strict=True)}, tower_bits)
