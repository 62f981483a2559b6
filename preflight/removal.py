"""Taking whole blocks out: what is left of the budget, of the configuration, and when it cannot be done.

ShortGPT (Men et al., arXiv 2403.03853) removes the blocks whose output is most like their input. What is left has fewer
blocks of the usual form, which every runtime loads.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from api_schemas.methods.modegpt import ModegptConfig
from api_schemas.plans import Blocker, BlockShape
from preflight.families import Family
from preflight.shapes import shapes_for

PER_BLOCK = ("layer_types",)  # configuration values with an entry per block
ROUNDING = 1e-9


def remaining_step(step: ModegptConfig, blocks: int) -> ModegptConfig:
    """The step for the blocks that stay: the same whole budget, of which the removed blocks have met their part.

    Args:
        step: the recipe's, with a sparsity of all blocks' parameters.
        blocks: of the original; all of the same size.

    >>> asked = ModegptConfig(method="modegpt", sparsity=0.3, remove_blocks=2)
    >>> remaining_step(asked, 10).sparsity  # 7 of 10 blocks' parameters in 8 blocks
    0.125
    """
    if not step.remove_blocks:
        return step
    left = max(0.0, 1 - (1 - step.known_sparsity) * blocks / (blocks - step.remove_blocks))
    return step.model_copy(update={"sparsity": round(left, 12), "remove_blocks": 0})


def remaining_config(family: Family, config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The configuration of a model that has only the blocks `kept`, in this order."""
    changed = {**config, family.keys.get("num_hidden_layers", "num_hidden_layers"): len(kept)}
    for name in PER_BLOCK:
        if isinstance(config.get(name), list):
            changed[name] = [config[name][index] for index in kept]
    return changed


def remaining_shapes(family: Family, config: Mapping[str, Any], step: ModegptConfig) -> tuple[BlockShape, ...]:
    """Widths of the blocks that stay, where the budget is spent evenly; raises what `shapes_for` raises."""
    blocks = family.block_count(config)
    staying = remaining_config(family, config, range(blocks - step.remove_blocks))
    return shapes_for(family, staying, remaining_step(step, blocks))


def removal_blockers(family: Family, config: Mapping[str, Any], step: ModegptConfig) -> list[Blocker]:
    """Why that many blocks cannot be taken out of this model."""
    count, blocks, sparsity = step.remove_blocks, family.block_count(config), step.known_sparsity
    param = "recipe.steps.0.remove_blocks"
    if not count:
        return []
    if count >= blocks:
        message = f"remove_blocks {count}: the model has {blocks} blocks, and at least one must stay"
        return [Blocker(code="remove_blocks_too_many", message=message, param=param)]
    found = []
    if count / blocks > sparsity + ROUNDING:
        message = (
            f"remove_blocks {count}: {count} of {blocks} blocks are {count / blocks:.3f} of their parameters, more "
            f"than sparsity {sparsity}; raise the sparsity or remove fewer"
        )
        found.append(Blocker(code="remove_blocks_exceed_sparsity", message=message, param=param))
    if _places_matter(family, config):
        message = (
            f"remove_blocks {count}: blocks of this {family.name} differ by their place (windows, rotary embedding), "
            "and runtimes count places; leave remove_blocks out"
        )
        found.append(Blocker(code="remove_blocks_places", message=message, param=param))
    return found


def _places_matter(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether a block's kind follows from its number."""
    kinds = config.get("layer_types")
    several = isinstance(kinds, list) and len(set(map(str, kinds))) > 1
    return several or family.blocks_by_place or bool(config.get("use_sliding_window"))
