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

Two streams of hidden states walk side by side. Notation as in `modegpt.py`; x original, y compressed, n the norm. What
kind of block they pass (sequential or parallel, scaled, with post-norms, with experts) is a matter of the family's
table: `core.halves` runs the halves, `modegpt_streams` has their aims.
"""

from torch import Tensor, nn

from api_schemas.reports import ModuleReport
from compression.core.blockwise import chunks, run_block_
from compression.core.protocols import BlockResult, Solution, Step
from compression.core.refit import Folds, Refitted, RunningCross
from compression.core.statistics import RunningInfluence, relative_distance
from compression.core.taps import inputs_of, run_until
from compression.core.timeline import span
from compression.methods.modegpt_refined_attention import solve_query_key, solve_value_output
from compression.methods.modegpt_refined_mlp import correct_mlp_inputs, solve_mlp
from compression.methods.modegpt_streams import Streams, correct_inputs


class TwoStreams(Streams):
    """Walks original and compressed hidden states through the blocks, solving each block on the way."""

    def replay_(self, index: int, result: BlockResult) -> None:
        """Pass a block that an earlier attempt finished."""
        run_block_(self.model, self.model.block(index, self.model.block_state(index)), index, self.original)
        run_block_(self.model, self.narrow(index, result.state), index, self.compressed)

    def solve_(self, index: int, state: dict[str, Tensor]) -> Step:
        """Solve one block and pass it; `state` holds its original tensors."""
        dense = self.model.block(index, state)
        new = dict(state)
        start = self.compressed[next(chunks(self.compressed))].clone()
        influence = RunningInfluence()
        folds = self._pass_original_(dense, index, influence)
        # what each part's report has to answer for
        solves: dict[str, list[Refitted]] = {"query_key": [], "value_output": [], "mlp": []}
        names, ridge = self.family.attention, self.config.input_ridge
        if self.config.corrects_inputs and index > 0:
            solves["query_key"] += correct_inputs(new, (names.query, names.key), folds, ridge)
            solves["value_output"] += correct_inputs(new, (names.value,), folds, ridge)
        if self.halves.parallel and index > 0:  # its MLP reads what attention reads
            solves["mlp"] += self._correct_mlp_inputs(dense, index, new)
        with span("solve", module="query_key"):
            reports = [solve_query_key(self, index, new)]
        with span("solve", module="value_output"):
            reports.append(solve_value_output(self, index, new, state, solves["value_output"]))
        if not self.halves.parallel:
            self._pass_attention_(index, new)
            solves["mlp"] += self._correct_mlp_inputs(dense, index, new)
        with span("solve", module="mlp"):
            reports.append(solve_mlp(self, index, new, self.compressed, solves["mlp"]))
        narrow = self.narrow(index, new)
        for part in chunks(self.compressed):
            self.compressed[part] = self.halves.finish(narrow, self.compressed[part], index)
        here = self.model.forward(dense, start, index)
        lost = self.model.forward(narrow, start, index) - here
        influence.sum_(self.share.group)
        return Step(
            Solution(new, tuple(_answer_for(report, solves[report.module]) for report in reports)),
            block_influence=influence.value(),
            relative_output_error=float(lost.norm() / (here - start).norm().clamp_min(1e-30)),
            stream_error=relative_distance(self.compressed, self.original, self.share.group),
        )

    def _pass_original_(self, dense: nn.Module, index: int, influence: RunningInfluence) -> Folds:
        """Advance x through the block, keep it where the MLP reads; moments of n(y) against n(x) before attention."""
        query = self.family.attention.query
        running = RunningCross(self.size.hidden, self.size.hidden, self.share)
        taps = {"normed": query, "middle": self.family.mlp_norm}
        self.norms = {half: dense.get_submodule(norm) for half, norm in self.post_norms.items()}
        with inputs_of(dense, {**taps, **self.post_norms}) as taken:
            for part in chunks(self.original):
                output = self.model.forward(dense, self.original[part], index)
                normed, self.middle[part] = taken["normed"], taken["middle"].view_as(output)
                for half in self.post_norms:
                    self.said[half][part] = taken[half]
                running.add(run_until(self.model, dense, self.compressed[part], index, query), normed)
                influence.add(self.original[part], output)
                self.original[part] = output
        return running.folds()

    def _pass_attention_(self, index: int, new: dict[str, Tensor]) -> None:
        """Advance y to where the MLP reads it, through the narrowed attention."""
        block = self.narrow(index, new, mlp_width=self.size.mlp_width)
        for part in chunks(self.compressed):
            self.compressed[part] = self.halves.half_way(block, self.compressed[part], index)

    def _correct_mlp_inputs(self, dense: nn.Module, index: int, new: dict[str, Tensor]) -> list[Refitted]:
        """Re-fit what reads the MLP's input to the compressed stream, in place."""
        if not self.config.corrects_inputs:
            return []
        running = RunningCross(self.size.hidden, self.size.hidden, self.share)
        for part in chunks(self.compressed):
            normed = self.halves.mlp_inputs(dense, self.compressed[part], index)
            running.add(normed, self.halves.mlp_inputs(dense, self.middle[part], index))
        return correct_mlp_inputs(self, new, running.folds())


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
