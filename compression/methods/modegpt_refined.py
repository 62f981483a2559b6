"""MoDeGPT, refined: the same three decompositions, each told what the model minds and what went wrong before it.

What is added to `modegpt.py`, all in closed form and without training (names are the recipe's options):

    metric `loss`          errors are measured by how much the loss minds them (`core.sensitivity`), not by their length
    column_choice `output_aware`  MLP units leave by optimal-brain-surgeon prices in that metric (`core.selection`)
    input_refit            query, key, value, gate and up read the compressed stream y; they are re-fitted to say what
                           the originals say of the original stream x:  min_W' E‖n(y) W'ᵀ − n(x) Wᵀ‖²
    refit `error_corrected`  o_proj and down_proj are re-fitted to bring the stream back: their target is the original
                           stream after them minus the compressed stream before them, so they repair what earlier
                           blocks lost (modelled on PIFA's M step, arXiv 2501.19090, with the residual in the target)
    o_proj across heads    one re-fit for all heads' channels, which sees their correlation

Two streams of hidden states walk side by side. Notation as in `modegpt.py`; x original, y compressed, n the norm.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from api_schemas.methods.modegpt import ModegptConfig
from api_schemas.plans import BlockShape
from api_schemas.reports import ModuleReport
from compression.core.blockwise import chunks, run_block_
from compression.core.protocols import BlockResult, Solution, Step
from compression.core.refit import Folds, Refitted, RunningCross
from compression.core.selection import removal_order, symmetric_factor
from compression.core.sensitivity import Metrics
from compression.core.statistics import BlockStatistics, RunningInfluence
from compression.core.streamed_model import StreamedModel
from compression.core.taps import inputs_of, run_until
from compression.methods.modegpt import Modegpt, module_report
from compression.methods.modegpt_decompositions import leverage_scores, value_output

METRIC_FLOOR = 1e-6  # of the mean diagonal: directions the loss never minded on the sample still count for something


class TwoStreams:
    """Walks original and compressed hidden states through the blocks, solving each block on the way."""

    def __init__(
        self,
        model: StreamedModel,
        method: Modegpt,
        hidden: Tensor,
        metrics: Callable[[int], Metrics | None],
    ) -> None:
        """Start both streams at the embeddings.

        Args:
            model: the original.
            method: shapes, names and the choice of rotary pairs.
            hidden: `[windows, tokens, hidden]`, taken over.
            metrics: of each block; None where the recipe measures plainly.
        """
        self.model, self.method, self.metrics = model, method, metrics
        self.config: ModegptConfig = method.config
        self.original, self.compressed, self.middle = hidden, hidden.clone(), torch.empty_like(hidden)
        self._names, self._mlp, self._second_norm = method.family.attention, method.family.mlp, method.family.norms[1]

    def replay_(self, index: int, result: BlockResult) -> None:
        """Pass a block that an earlier attempt finished."""
        run_block_(self.model, self.model.block(index, self.model.block_state(index)), index, self.original)
        run_block_(self.model, self._narrow(index, result.state), index, self.compressed)

    def solve_(self, index: int, state: dict[str, Tensor]) -> Step:
        """Solve one block and pass it; `state` holds its original tensors."""
        dense = self.model.block(index, state)
        new = dict(state)
        start = self.compressed[next(chunks(self.compressed))].clone()
        influence = RunningInfluence()
        folds = self._pass_original_(dense, index, influence)
        solves: dict[str, list[Refitted]] = {
            "query_key": [],
            "value_output": [],
            "mlp": [],
        }  # what each part's report has to answer for
        if self.config.corrects_inputs and index > 0:
            solves["query_key"] += self._correct_inputs(new, (self._names.query, self._names.key), folds)
            solves["value_output"] += self._correct_inputs(new, (self._names.value,), folds)
        reports = [self._query_key(index, new), self._attention_(index, new, state, solves["value_output"])]
        folds = self._pass_attention_(dense, index, new)
        if self.config.corrects_inputs:
            solves["mlp"] += self._correct_inputs(new, self._mlp.inputs, folds)
        reports.append(self._mlp_(dense, index, new, solves["mlp"]))
        reports = [_answer_for(report, solves[report.module]) for report in reports]
        here = self.model.forward(dense, start, index)
        lost = self.model.forward(self._narrow(index, new), start, index) - here
        apart = (self.compressed - self.original).norm() / self.original.norm()
        return Step(
            Solution(new, tuple(reports)),
            block_influence=influence.value(),
            relative_output_error=float(lost.norm() / (here - start).norm().clamp_min(1e-30)),
            stream_error=float(apart),
        )

    def _pass_original_(self, dense: nn.Module, index: int, influence: RunningInfluence) -> Folds:
        """Advance x through the block, keep it half way; moments of n(y) against n(x) before attention."""
        width = self.original.shape[-1]
        running = RunningCross(width, width)
        with inputs_of(dense, {"normed": self._names.query, "middle": self._second_norm}) as taken:
            for part in chunks(self.original):
                output = self.model.forward(dense, self.original[part], index)
                normed, self.middle[part] = taken["normed"], taken["middle"]
                running.add(run_until(self.model, dense, self.compressed[part], index, self._names.query), normed)
                influence.add(self.original[part], output)
                self.original[part] = output
        return running.folds()

    def _correct_inputs(self, new: dict[str, Tensor], linears: tuple[str, ...], folds: Folds) -> list[Refitted]:
        """Re-fit linears that read the stream: from n(y), say what the original says of n(x)."""
        solves = []
        for linear in linears:
            W, b = new[f"{linear}.weight"].double(), _double(new.get(f"{linear}.bias"))
            solves.append(folds.towards(W, b).refit(W, b, self.config.input_ridge))
            self._store(new, linear, solves[-1])
        return solves

    def _query_key(self, index: int, new: dict[str, Tensor]) -> ModuleReport:
        """Choose rotary pairs by the energies of the corrected query and key on the compressed stream."""
        statistics = BlockStatistics(self.method.family, self.method.size, gram=False)
        if self.method.shapes[index].query_key_rank == self.method.size.head_dim:  # all pairs stay: nothing to observe
            return self.method.narrow_query_key(index, new, statistics)
        block = self.model.block(index, new)
        with statistics.watching(block):
            for part in chunks(self.compressed):
                run_until(self.model, block, self.compressed[part], index, self._names.value)
        return self.method.narrow_query_key(index, new, statistics)

    def _attention_(
        self, index: int, new: dict[str, Tensor], state: dict[str, Tensor], solves: list[Refitted]
    ) -> ModuleReport:
        """Narrow value and output: basis from the corrected output's error in the metric, then one re-fit."""
        size, rank = self.method.size, self.method.shapes[index].value_output_rank
        name = f"{self._names.output}.weight"
        W, bias = state[name].double(), _double(state.get(f"{self._names.output}.bias"))
        wide = self.method.shapes[index].model_copy(
            update={"value_output_rank": size.head_dim, "mlp_width": size.mlp_width}
        )
        block = self.model.resized_block(index, new, wide.model_dump(), self.method.scaling(index))
        running = RunningCross(W.shape[1], W.shape[0])
        for part in chunks(self.compressed):
            mixed = run_until(self.model, block, self.compressed[part], index, self._names.output)
            lacking = self.middle[part] - self.compressed[part]
            running.add(mixed, self._target(mixed, lacking, W, bias), token_weights(self.middle[part]))
        folds, damping = running.folds(), 0.0
        solved = folds.refit(W, bias, self.config.output_ridge)
        if rank < size.head_dim:
            start, folds, damping = self._narrow_values(index, new, solved.weight, folds, rank)
            solved = folds.refit(start, solved.bias, self.config.output_ridge)
        solves.append(solved)
        self._store(new, self._names.output, solved)
        error = folds.whole.relative_error(solved.weight, solved.bias)
        return module_report("value_output", size.head_dim, rank, error, damping)

    def _narrow_values(
        self, index: int, new: dict[str, Tensor], W: Tensor, folds: Folds, rank: int
    ) -> tuple[Tensor, Folds, float]:
        """Replace the value channels by the best `rank` per key/value head; returns output weight, folds, damping."""
        size = self.method.size
        metrics = self.metrics(index)
        root = None if metrics is None else symmetric_factor(_floored(metrics.attention))
        by_head = folds.whole.gram.reshape(size.heads, size.head_dim, size.heads, size.head_dim)
        heads = W.reshape(size.hidden, size.kv_heads, size.group, size.head_dim)
        maps, damping = [], 0.0
        for head in range(size.kv_heads):
            own = range(head * size.group, (head + 1) * size.group)
            G = torch.stack([by_head[query, :, query] for query in own]).mean(dim=0)
            outputs = heads[:, head].transpose(0, 1)
            seen = outputs if root is None else root.T @ outputs
            solved = value_output(G, seen, rank)
            maps.append(solved.basis)
            damping = max(damping, solved.damping)
        basis = torch.stack(maps)
        self.method.apply_maps(new, self._names.value, basis)
        inverse = torch.linalg.pinv(basis).repeat_interleave(size.group, dim=0)
        start = torch.einsum("hrc,dhc->dhr", inverse, W.reshape(size.hidden, size.heads, size.head_dim))
        mapping = torch.block_diag(*basis.repeat_interleave(size.group, dim=0))
        return start.reshape(size.hidden, -1), folds.mapped(mapping), damping

    def _pass_attention_(self, dense: nn.Module, index: int, new: dict[str, Tensor]) -> Folds:
        """Advance y to half way through the narrowed attention; moments of n(y) against n(x) before the MLP."""
        size = self.method.size
        block = self._narrow(index, new, whole_mlp=True)
        norm = dense.get_submodule(self._second_norm)
        running = RunningCross(size.hidden, size.hidden)
        for part in chunks(self.compressed):
            self.compressed[part] = run_until(self.model, block, self.compressed[part], index, self._second_norm)
            running.add(norm(self.compressed[part]), norm(self.middle[part]))
        return running.folds()

    def _mlp_(self, dense: nn.Module, index: int, new: dict[str, Tensor], solves: list[Refitted]) -> ModuleReport:
        """Choose units, re-fit down, and advance y to the end of the block."""
        size, width = self.method.size, self.method.shapes[index].mlp_width
        W, bias = new[f"{self._mlp.down}.weight"].double(), _double(new.get(f"{self._mlp.down}.bias"))
        folds = self._mlp_folds(dense, index, new, W, bias)
        solved = folds.refit(W, bias, self.config.output_ridge)
        if width < size.mlp_width:
            kept = self._units(index, folds.whole.gram, solved.weight, width)
            folds = folds.selected(kept)
            solved = folds.refit(solved.weight[:, kept], solved.bias, self.config.output_ridge)
            for linear in self._mlp.inputs:
                for name in (f"{linear}.weight", f"{linear}.bias"):
                    if name in new:
                        new[name] = new[name][kept]
        solves.append(solved)
        self._store(new, self._mlp.down, solved)
        block, norm = self._narrow(index, new), dense.get_submodule(self._second_norm)
        module = block.get_submodule(self._mlp.down.rpartition(".")[0])
        for part in chunks(self.compressed):
            self.compressed[part] += module(norm(self.compressed[part]))
        error = folds.whole.relative_error(solved.weight, solved.bias)
        return module_report("mlp", size.mlp_width, width, error, 0.0)

    def _mlp_folds(self, dense: nn.Module, index: int, new: dict[str, Tensor], W: Tensor, bias: Tensor | None) -> Folds:
        """Moments of the corrected units against what the stream still lacks."""
        block = self._narrow(index, new, whole_mlp=True)
        parent, _, down = self._mlp.down.rpartition(".")
        module, norm = block.get_submodule(parent), dense.get_submodule(self._second_norm)
        running = RunningCross(W.shape[1], W.shape[0])
        with inputs_of(module, {"units": down}) as taken:
            for part in chunks(self.compressed):
                module(norm(self.compressed[part]))
                lacking = self.original[part] - self.compressed[part]
                target = self._target(taken["units"], lacking, W, bias)
                running.add(taken["units"], target, token_weights(self.original[part]))
        return running.folds()

    def _units(self, index: int, gram: Tensor, W: Tensor, width: int) -> Tensor:
        if self.config.chooses_columns == "leverage":
            return torch.topk(leverage_scores(gram, self.config.ridge), width).indices.sort().values
        metrics = self.metrics(index)
        metric = None if metrics is None else _floored(metrics.mlp)
        return removal_order(gram, W, metric, self.config.resolved_round_to).keep(width)

    def _target(self, inputs: Tensor, lacking: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        """What a re-fit aims at: what the stream lacks, or with refit `local` only what the linear said."""
        if self.config.refits == "error_corrected":
            return lacking
        return nn.functional.linear(inputs, W.float(), None if bias is None else bias.float())

    def _narrow(self, index: int, state: dict[str, Tensor], *, whole_mlp: bool = False) -> nn.Module:
        shape: BlockShape = self.method.shapes[index]
        if whole_mlp:
            shape = shape.model_copy(update={"mlp_width": self.method.size.mlp_width})
        return self.model.resized_block(index, state, shape.model_dump(), self.method.scaling(index))

    def _store(self, new: dict[str, Tensor], linear: str, solved: Refitted) -> None:
        """Put a solved linear into the block in storage dtype."""
        new[f"{linear}.weight"] = solved.weight.to(new[f"{linear}.weight"].dtype)
        if solved.bias is not None:
            new[f"{linear}.bias"] = solved.bias.to(new[f"{linear}.bias"].dtype)


def token_weights(stream: Tensor) -> Tensor:
    """One over the root mean square of the original stream at each token, `[..., 1]`.

    The next norm divides by it, so an error counts relative to it. Without this the few tokens with massive
    activations (the first of a text, mostly) outweigh all others in every sum of squares.
    """
    return stream.square().mean(dim=-1, keepdim=True).clamp_min(1e-12).rsqrt()


def _answer_for(report: ModuleReport, solves: list[Refitted]) -> ModuleReport:
    """Add to a part's report what its re-fits needed: the last one's ridge, the largest damping, any fallback."""
    if not solves:
        return report
    fallbacks = [report.fallback, *(solved.fallback for solved in solves)]
    return report.model_copy(
        update={
            "ridge": solves[-1].ridge,
            "damping": max(report.damping, *(solved.damping for solved in solves)),
            "fallback": "; ".join(dict.fromkeys(one for one in fallbacks if one)) or None,
        }
    )


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def _floored(metric: Tensor) -> Tensor:
    identity = torch.eye(len(metric), dtype=metric.dtype)
    return metric + METRIC_FLOOR * metric.diagonal().mean() * identity
