"""Mode refined, MLP: which units stay and what the down projection makes of them; experts on the tokens they see."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from api_schemas.reports import ModuleReport
from compression.core.blockwise import chunks
from compression.core.halves import Heard
from compression.core.parallel import sum_of_counts
from compression.core.refit import Folds, Refitted, RunningCross
from compression.core.selection import removal_order
from compression.methods.modegpt import module_report, not_refitted
from compression.methods.modegpt_decompositions import by_weight_norm, leverage_scores
from compression.methods.modegpt_streams import (
    Streams,
    correct_inputs,
    floored,
    says,
    store,
    weight_and_bias,
)
from preflight.families.parts import Mlp


@dataclass
class _Seen:
    """What one MLP was told: moments of its units against their targets, and of how many tokens."""

    names: Mlp
    moments: RunningCross
    tokens: int = 0


def correct_mlp_inputs(at: Streams, new: dict[str, Tensor], folds: Folds) -> list[Refitted]:
    """Re-fit what reads the MLP's input, in place.

    Experts and their router share one map of n(y) to n(x), with one ridge, found on all tokens: moments for each
    expert would be of few tokens and many.
    """
    if at.family.experts is None:
        return correct_inputs(new, at.family.mlp.inputs, folds, at.config.input_ridge)
    identity = torch.eye(at.size.hidden, dtype=torch.float64, device=folds.fit.gram.device)
    solved = folds.towards(identity, None).refit(identity, None, at.config.input_ridge)
    linears = [linear for mlp in at.family.mlps(at.size) for linear in mlp.inputs]
    for linear in (at.family.experts.router, *linears):
        weight = new[f"{linear}.weight"]
        new[f"{linear}.weight"] = (weight.double() @ solved.weight).to(weight.dtype)
    return [solved]


def solve_mlp(at: Streams, index: int, new: dict[str, Tensor], middle: Tensor, solves: list[Refitted]) -> ModuleReport:
    """Choose units and re-fit down, in place.

    Args:
        at: the streams.
        index: which block.
        new: its tensors, all but the MLP solved.
        middle: `[windows, tokens, hidden]` the compressed stream where the MLP reads it.
        solves: what the part's re-fits needed, to which these are added.
    """
    size, width = at.size, at.method.shapes[index].mlp_width
    metrics = at.metrics(index)
    metric = None if metrics is None else floored(metrics.mlp)
    unseen, errors = [], []
    listening = _listen(at, index, new, middle)
    for expert, seen in enumerate(listening):
        if at.family.experts is not None and seen.tokens < width:  # its re-fit would not be determined
            unseen.append(expert)
            _keep_by_norm(new, seen.names, width)
            continue
        solved, folds = _solve_one(at, new, seen, width, metric)
        solves.append(solved)
        errors.append(folds.whole.relative_error(solved.weight, solved.bias))
    error = (sum(one**2 for one in errors) / max(1, len(errors))) ** 0.5
    coverage = tuple(seen.tokens for seen in listening) if at.family.experts is not None else None
    return module_report("mlp", size.mlp_width, width, error, 0.0, not_refitted(unseen, width), coverage)


def _listen(at: Streams, index: int, new: dict[str, Tensor], middle: Tensor) -> list[_Seen]:
    """Moments of the corrected units against what the stream still lacks, for each MLP on the tokens it sees."""
    size = at.size
    block = at.narrow(index, new, mlp_width=size.mlp_width)
    seen = [_Seen(names, RunningCross(size.mlp_width, size.hidden, at.share)) for names in at.family.mlps(size)]
    for part in chunks(middle):
        heard = at.halves.without_mlp_output(block, middle[part], index)
        aim, weights = at.aim("mlp", part, heard.rest)
        if at.family.experts is None:
            units = heard.inputs[seen[0].names.down]
            seen[0].tokens += weights.numel()
            seen[0].moments.add(units, at.target(aim, units, *weight_and_bias(new, seen[0].names.down)), weights)
        else:
            _add_experts(at, new, seen, heard, aim.flatten(0, 1), weights.flatten(0, 1))
    for one in seen:
        one.tokens = sum_of_counts(at.share.group, one.tokens)
    return seen


def _add_experts(
    at: Streams, new: dict[str, Tensor], seen: Sequence[_Seen], heard: Heard, aim: Tensor, weights: Tensor
) -> None:
    """Add each expert's units and targets on the tokens that it sees; `aim` and `weights` are `[tokens, …]`."""
    said = {
        expert: says(heard.inputs[one.names.down], *weight_and_bias(new, one.names.down))
        for expert, one in enumerate(seen)
        if one.names.down in heard.inputs
    }
    targets = said if at.config.refits == "local" else expert_targets(heard, said, aim)
    for expert, target in targets.items():
        one, routed = seen[expert], heard.routed(expert)
        one.tokens += len(target)
        one.moments.add(heard.inputs[one.names.down], target, weights[routed.rows] * routed.weight)
    for expert, one in enumerate(seen):
        if expert not in targets:
            one.moments.skip()


def expert_targets(heard: Heard, said: dict[int, Tensor], aim: Tensor) -> dict[int, Tensor]:
    """What each expert should say, `[its tokens, hidden]`, so that their weighted sum is the aim.

    Args:
        heard: the run with silent down projections.
        said: what each expert says now, of the tokens that it sees.
        aim: `[tokens, hidden]` of the sum.
    """
    lacking = aim.clone()
    for expert, own in said.items():
        routed = heard.routed(expert)
        lacking[routed.rows] -= routed.weight * own
    every = ((expert, own, heard.routed(expert)) for expert, own in said.items())
    return {expert: own + routed.share * lacking[routed.rows] for expert, own, routed in every}


def _solve_one(
    at: Streams, new: dict[str, Tensor], seen: _Seen, width: int, metric: Tensor | None
) -> tuple[Refitted, Folds]:
    """Narrow one MLP, in place."""
    W, bias = weight_and_bias(new, seen.names.down)
    folds = seen.moments.folds()
    solved = folds.refit(W, bias, at.config.output_ridge)
    if width < at.size.mlp_width:
        kept = _units(at, folds.whole.gram, solved.weight, width, metric)
        folds = folds.selected(kept)
        solved = folds.refit(solved.weight[:, kept], solved.bias, at.config.output_ridge, like=solved)
        _keep(new, seen.names, kept)
    store(new, seen.names.down, solved)
    return solved, folds


def _units(at: Streams, gram: Tensor, W: Tensor, width: int, metric: Tensor | None) -> Tensor:
    if at.config.chooses_columns == "leverage":
        return torch.topk(leverage_scores(gram, at.config.ridge), width).indices.sort().values
    return removal_order(gram, W, metric, at.config.resolved_round_to, until=width).keep(width)


def _keep_by_norm(new: dict[str, Tensor], names: Mlp, width: int) -> None:
    down = f"{names.down}.weight"
    kept = by_weight_norm([new[f"{name}.weight"] for name in names.inputs], new[down], width)
    new[down] = new[down][:, kept]
    _keep(new, names, kept)


def _keep(new: dict[str, Tensor], names: Mlp, kept: Tensor) -> None:
    """Leave only these units' rows in the linears that make them."""
    for linear in names.inputs:
        for name in (f"{linear}.weight", f"{linear}.bias"):
            if name in new:
                new[name] = new[name][kept]
