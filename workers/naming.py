"""Names of compressed models."""

from collections.abc import Callable

from api_schemas.methods import Int8Config, MethodConfig, ModegptConfig, Nf4Config, TinygptvConfig
from api_schemas.recipe import Recipe

LONGEST = 128
DIGITS = 6


def compressed_name(model: str, recipe: Recipe, suffix: str | None, job_id: str, taken: Callable[[str], bool]) -> str:
    """Return `<model>-<suffix>-<hex of the job id>`, e.g. `smol-modegpt-20pct-portable-1f2e3d`.

    Args:
        model: id of the original.
        recipe: its steps name the artifact when there is no suffix.
        suffix: what the user wants the name to end with, before the digits.
        job_id: its last 24 characters are random hex digits.
        taken: whether a name belongs to another model; then more digits are used.
    """
    label = suffix or "-".join(map(_label, recipe.steps))
    digits = job_id.rpartition("-")[2]
    for count in (DIGITS, 2 * DIGITS, len(digits)):
        tail = f"-{label}-{digits[:count]}"
        name = model[: LONGEST - len(tail)] + tail
        if not taken(name):
            return name
    raise ValueError(f"every name for the artifact of {job_id} is taken")


def _label(step: MethodConfig) -> str:
    if isinstance(step, ModegptConfig):
        return f"{step.method}-{_size(step)}-{step.layout}"
    if isinstance(step, Int8Config | Nf4Config | TinygptvConfig):
        return step.method
    return f"{step.method}-int{step.bits}"


def _size(step: ModegptConfig) -> str:
    """How much goes, what may stay, or what may be lost: 20pct, 90MB, 110M, ppl10pct."""
    if step.target is None:
        return f"{100 * step.known_sparsity:g}pct"
    if step.target.perplexity_increase is not None:
        return f"ppl{100 * step.target.perplexity_increase:.4g}pct"
    units = (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
    letter, unit = next(pair for pair in units if step.target.limit >= pair[1])
    return f"{step.target.limit / unit:.4g}{letter}{'B' if step.target.goal == 'bytes' else ''}"
