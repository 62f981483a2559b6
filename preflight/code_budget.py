"""What a model needs in memory while it answers, and what of it codes can save: the budget of method `tinygptv`.

    weights + keys and values of `context_length` tokens + activations of one pass over them

Rules are by a part's role, never by a model's name: linears of the decoder's blocks take 4, 8 or 16 bits, those of the
vision tower 8 or 16; Q-Former, projector, norms, embeddings and head stay.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from api_schemas.methods.tinygptv import TinygptvConfig
from api_schemas.plans import Blocker, BlockShape, QuantizedModule
from preflight.checkpoint import Checkpoint
from preflight.composites import Placed
from preflight.families import Family
from preflight.memory_needs import Needs, needs
from preflight.quantized_linears import OUTPUTS_ON_CPU, BlockLinear, code_bytes
from preflight.safetensors_header import TensorEntry

KEPT = 16


def tower_linears(placed: Placed | None) -> dict[str, TensorEntry]:
    """Weights of the vision tower's numbered layers that are matrices, by their modules on disk; what may be int8."""
    if placed is None:
        return {}
    return {
        name.removesuffix(".weight"): entry
        for name, entry in placed.others.items()
        if placed.composite.part_of(name) == "vision"
        and name.endswith(".weight")
        and len(entry.shape) == 2
        and numbered_tail(name)
    }


def numbered_tail(path: str) -> str:
    """The end of a module's path from its first numbered component's parent on; empty where nothing is numbered.

    >>> numbered_tail("vision_tower.vision_model.encoder.layers.3.mlp.fc1")
    'layers.3.mlp.fc1'
    """
    parts = path.split(".")
    first = next((at for at, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[first - 1 :]) if first else ""


def candidates(step: TinygptvConfig, linear: BlockLinear, *, mixes: bool, base: int) -> tuple[int, ...]:
    """The bits that a linear may get, most first.

    Args:
        step: the recipe's.
        linear: stored linear of a block.
        mixes: whether 8 and 4 bits may stand beside each other.
        base: the one kind of code that may, where they may not.
    """
    if linear.kept_by:
        return (KEPT,)
    if step.preset == "paper":
        return (8,)
    fits = linear.columns % step.nf4.block_size == 0 and linear.rows % OUTPUTS_ON_CPU == 0
    codes = (8, 4) if mixes else (base,)
    return (KEPT, *(bits for bits in codes if bits == 8 or fits))


def bytes_at(step: TinygptvConfig, bits: int, rows: int, columns: int, *, itemsize: int, dtype: str) -> int:
    """Bytes of a linear at so many bits a weight."""
    if bits == KEPT:
        return itemsize * rows * columns
    form = step.int8 if bits == 8 else step.nf4
    return code_bytes(form, rows, columns, itemsize=itemsize, dtype=dtype)


@dataclass(frozen=True)
class CodeBudget:
    """What may be chosen, and what it must come to.

    Attributes:
        step: the recipe's.
        linears: of the decoder's blocks.
        tower: the vision tower's.
        mixes: whether 8 and 4 bits may stand beside each other: where the result needs `compression.runtime` anyway.
        itemsize: bytes of a plain weight.
        dtype: of plain weights.
        fixed: bytes of all weights that no choice changes.
        needs: bytes beside the weights.
    """

    step: TinygptvConfig
    linears: tuple[BlockLinear, ...]
    tower: Mapping[str, TensorEntry]
    mixes: bool
    itemsize: int
    dtype: str
    fixed: int
    needs: Needs

    @property
    def allowed(self) -> int | None:
        """Bytes that weights may take; None under preset `paper`."""
        limit = self.step.limit
        return None if limit is None else limit - self.needs.cache - self.needs.activations

    @property
    def bases(self) -> tuple[int, ...]:
        """Kinds of code to try as the only one; of no meaning where they mix."""
        return (8,) if self.mixes or self.step.preset == "paper" else (8, 4)

    def bytes_of(self, linear: BlockLinear, bits: int) -> int:
        """Bytes of a block's linear at so many bits."""
        return bytes_at(self.step, bits, linear.rows, linear.columns, itemsize=self.itemsize, dtype=self.dtype)

    def options(self, linear: BlockLinear, base: int) -> tuple[int, ...]:
        """The bits that a linear may get, most first."""
        return candidates(self.step, linear, mixes=self.mixes, base=base)

    def tower_options(self, base: int) -> tuple[int, ...]:
        """The bits that the vision tower may get, as a whole."""
        eight = self.tower and self.step.preset != "paper" and (self.mixes or base == 8)
        return (KEPT, 8) if eight else (KEPT,)

    def tower_bytes(self, bits: int) -> int:
        """Bytes of the tower's linears at so many bits."""
        if bits == KEPT:
            return sum(entry.bytes for entry in self.tower.values())
        return sum(
            code_bytes(self.step.int8, *entry.shape, itemsize=self.itemsize, dtype=self.dtype)
            for entry in self.tower.values()
        )

    def total(self, bits: Mapping[str, int], tower: int) -> int:
        """Bytes of all weights under a choice by the linears' paths."""
        return self.fixed + self.tower_bytes(tower) + sum(self.bytes_of(one, bits[one.path]) for one in self.linears)

    def least(self, base: int) -> tuple[dict[str, int], int]:
        """The choice of fewest bytes."""
        return {one.path: self.options(one, base)[-1] for one in self.linears}, self.tower_options(base)[-1]

    @property
    def smallest(self) -> int:
        """Bytes of the weights when all take as few bits as they may."""
        return min(self.total(*self.least(base)) for base in self.bases)

    @property
    def plain(self) -> int:
        """Bytes of the weights as they are."""
        return self.total({one.path: KEPT for one in self.linears}, KEPT)

    @property
    def planned(self) -> int:
        """Bytes of weights that the plan may promise: exact under preset `paper`, at most so many otherwise."""
        if self.allowed is None:
            return self.smallest
        return max(self.smallest, min(self.plain, self.allowed))

    def modules(self) -> tuple[QuantizedModule, ...]:
        """The plan's list, at the fewest bits that each may get."""
        base = min(self.bases, key=lambda one: self.total(*self.least(one)))
        chosen, tower = self.least(base)
        rows = [
            (
                one.path,
                KEPT,
                chosen[one.path],
                self.itemsize * one.rows * one.columns,
                self.bytes_of(one, chosen[one.path]),
                one.kept_by,
            )
            for one in self.linears
        ]
        rows += [
            (
                path,
                KEPT,
                tower,
                entry.bytes,
                entry.bytes
                if tower == KEPT
                else code_bytes(self.step.int8, *entry.shape, itemsize=self.itemsize, dtype=self.dtype),
                None,
            )
            for path, entry in self.tower.items()
        ]
        return tuple(
            QuantizedModule(
                module=path,
                bits=None if bits == KEPT else bits,
                bytes_before=before,
                bytes_after=after,
                kept_by=kept_by,
            )
            for path, _, bits, before, after, kept_by in rows
        )

    def blockers(self, place: str) -> list[Blocker]:
        """Why the budget cannot be met, or asks for nothing."""
        if self.allowed is None or self.step.limit is None:
            return []
        param = f"{place}.{'device' if self.step.device else 'fit_bytes'}"
        beside = self.needs.cache + self.needs.activations
        if self.smallest > self.allowed:
            message = (
                f"fit_bytes {self.step.limit}: at least {self.smallest + beside} are needed ({self.smallest} of "
                f"weights at the fewest bits, {self.needs.cache} of keys and values, {self.needs.activations} of "
                f"activations for {self.step.context_length} tokens); raise it, lower context_length, or narrow "
                "the model with 'modegpt' first"
            )
            return [Blocker(code="budget_unreachable", message=message, param=param)]
        if self.plain <= self.allowed:
            message = (
                f"fit_bytes {self.step.limit}: the model fits as it is ({self.plain + beside} bytes with its cache and "
                "activations), so nothing would become codes; lower it, or leave this step out"
            )
            return [Blocker(code="budget_already_met", message=message, param=param)]
        return []

    def note(self) -> str:
        """What the plan says of the budget."""
        if self.allowed is None:
            return "tinygptv, preset 'paper': the decoder's linears in LLM.int8, all else as it is"
        forms = "4, 8 or 16 bits" if self.mixes else "8 or 16 bits, or 4 or 16, whichever loses less"
        return (
            f"tinygptv: {self.allowed} bytes are left for weights beside {self.needs.cache} of keys and values and "
            f"{self.needs.activations} of activations; each linear gets {forms}, by its measured error; the list shows "
            "the fewest that it may get"
        )


def code_budget(
    checkpoint: Checkpoint,
    family: Family,
    step: TinygptvConfig,
    linears: tuple[BlockLinear, ...],
    shapes: Sequence[BlockShape],
    *,
    layout: str,
    whole_bytes: int,
    itemsize: int,
    dtype: str,
) -> CodeBudget:
    """Collect a budget.

    Args:
        checkpoint: the decoder's.
        family: its table.
        step: the recipe's.
        linears: of the blocks as they will be stored.
        shapes: widths of the blocks.
        layout: of the artifact.
        whole_bytes: of all weights before this step.
        itemsize: bytes of a plain weight.
        dtype: of plain weights.
    """
    placed = checkpoint.placed
    tower = tower_linears(placed)
    vision = None if placed is None else placed.whole.get("vision_config")
    changeable = sum(itemsize * one.rows * one.columns for one in linears)
    return CodeBudget(
        step=step,
        linears=linears,
        tower=tower,
        mixes=layout != "portable" or (placed is not None and placed.composite.ours),
        itemsize=itemsize,
        dtype=dtype,
        fixed=whole_bytes - changeable - sum(entry.bytes for entry in tower.values()),
        needs=needs(family.dimensions(checkpoint.config), shapes, step.context_length, vision),
    )
