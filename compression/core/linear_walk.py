"""The walk for methods that solve a block's linears one group after the other, each behind those solved before it.

Query, key and value read one input and are solved together, then output, then gate and up, then down: each group is
observed in the block whose earlier linears are already replaced ("true sequential" in GPTQ's code). A block is
calibrated on the outputs of the blocks before it as they have become.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from api_schemas.reports import ModuleReport
from compression.core.blockwise import chunks, run_block_
from compression.core.packed_forms import Codes, unpacked
from compression.core.parallel import WHOLE, Share
from compression.core.placement import moved
from compression.core.protocols import BlockResult, Solution, Step, Streamed
from compression.core.statistics import RunningGram, RunningInfluence
from compression.core.timeline import span
from preflight.quantized_linears import linear_groups


@dataclass(frozen=True)
class SolvedLinear:
    """One weight, quantised.

    Attributes:
        quantized: codes and scales, in the form that is stored.
        damping: in units of the mean diagonal of the inputs' correlation; 0 where nothing was factorised.
        fallback: what was done another way than asked.
    """

    quantized: Codes
    damping: float = 0.0
    fallback: str | None = None


class LinearMethod(Protocol):
    """A paper that quantises one weight at a time."""

    stage: ClassVar[str]

    def solve(self, weight: Tensor, correlation: Tensor, dtype: torch.dtype) -> SolvedLinear:
        """Quantise a weight.

        Args:
            weight: `[out, in]` float64.
            correlation: `E[x xᵀ]` of its inputs, `[in, in]` float64; zero where no token reached it.
            dtype: of the scales.
        """


class LinearStream:
    """Hidden states of one model: a block's linears are observed on them, solved, and the block passed."""

    def __init__(
        self,
        model: Streamed,
        methods: Mapping[tuple[int, str], LinearMethod | None],
        hidden: Tensor,
        share: Share = WHOLE,
    ) -> None:
        """Start at the embeddings.

        Args:
            model: what the step starts from.
            methods: what is done to each linear, by its block; None where it stays as it is.
            hidden: `[windows, tokens, hidden]` inputs of block 0, taken over.
            share: which part of all windows `hidden` is.
        """
        self.model, self.methods, self.hidden, self.share = model, methods, hidden, share

    def solve_(self, index: int, state: dict[str, Tensor]) -> Step:
        """Solve the linears of one block and pass it."""
        block, new = self.model.block(index, state), dict(state)
        influence = RunningInfluence()
        start = self.hidden[next(chunks(self.hidden))].clone()
        first = self.model.forward(block, start, index)
        rows: list[ModuleReport] = []
        for number, whole in enumerate(linear_groups(self.model.family, self.model.size)):
            group = {linear: method for linear in whole if (method := self.methods[index, linear]) is not None}
            if group or not number:  # the block's influence is taken in passing
                gram = self._observe(block, index, whole[0], None if number else influence)
                for linear, method in group.items():
                    with span("solve", module=linear):
                        rows.append(self._solve_linear_(block, new, linear, method, gram))
        error = self.model.forward(block, start, index) - first
        run_block_(self.model, block, index, self.hidden)
        lost = float(error.norm() / (first - start).norm().clamp_min(1e-30))
        return Step(Solution(new, tuple(rows)), influence.value(), lost, None)

    def replay_(self, index: int, result: BlockResult) -> None:
        """Pass a block that an earlier attempt finished."""
        block = self.model.block(index, unpacked(moved(result.state, self.model.device)))
        run_block_(self.model, block, index, self.hidden)

    def _observe(self, block: nn.Module, index: int, linear: str, influence: RunningInfluence | None) -> RunningGram:
        """Second moments of what reaches `linear`, over all chunks."""
        module = block.get_submodule(linear)
        assert isinstance(module, nn.Linear)  # noqa: S101 (canonical blocks have no other)
        gram = RunningGram(1, module.in_features)
        handle = module.register_forward_pre_hook(lambda _module, inputs: gram.add(inputs[0]))
        try:
            for part in chunks(self.hidden):
                output = self.model.forward(block, self.hidden[part], index)
                if influence is not None:
                    influence.add(self.hidden[part], output)
        finally:
            handle.remove()
        gram.sum_(self.share.group)
        if influence is not None:
            influence.sum_(self.share.group)
        return gram

    def _solve_linear_(
        self, block: nn.Module, new: dict[str, Tensor], linear: str, method: LinearMethod, gram: RunningGram
    ) -> ModuleReport:
        """Replace one linear in the block and in its tensors; says what that costs."""
        stored = new.pop(f"{linear}.weight")
        weight, correlation = stored.double(), gram.mean()[0]
        solved = method.solve(weight, correlation, stored.dtype)
        plain = solved.quantized.dequantized()
        block.get_submodule(linear).weight = nn.Parameter(plain.float(), requires_grad=False)
        new.update(solved.quantized.tensors(linear))
        return ModuleReport(
            module=linear,
            width_before=weight.shape[1],
            width_after=weight.shape[1],
            relative_output_error=relative_error(weight, plain.double(), correlation),
            damping=solved.damping,
            bits=solved.quantized.bits,
            fallback=solved.fallback,
            coverage=(gram.tokens,) if self.model.family.experts else None,
        )


def relative_error(weight: Tensor, approximation: Tensor, correlation: Tensor) -> float:
    """‖X(W−Ŵ)ᵀ‖/‖XWᵀ‖ from the inputs' correlation; 0 where no token was seen."""
    lost = weight - approximation
    whole = torch.sum((weight @ correlation) * weight)
    return float((torch.sum((lost @ correlation) * lost).clamp_min(0) / whole.clamp_min(1e-300)).sqrt())
