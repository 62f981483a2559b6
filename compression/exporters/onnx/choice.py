"""Which matrix is held in which form: the fast one, unless measuring says that it harms."""

from collections.abc import Mapping
from dataclasses import dataclass

from api_schemas.export_reports import ExportedOperator
from api_schemas.exports.onnx import OnnxExport
from compression.core.streamed_model import StreamedModel
from compression.exporters.onnx.codes import FLOAT32, Coding, stored_bytes
from compression.exporters.onnx.sensitivity import Loss


@dataclass(frozen=True)
class Forms:
    """What an export may hold matrices in.

    Attributes:
        usual: of the blocks' linears.
        careful: of the linears that `usual` harms, where there is such a choice.
        outer: of embedding and head.
    """

    usual: Coding
    careful: Coding | None
    outer: Coding

    @classmethod
    def of(cls, export: OnnxExport) -> "Forms":
        """The forms of an export's settings."""
        eight = Coding("blocks", 8, export.block)
        if export.weights == "float32":
            return cls(FLOAT32, None, FLOAT32)
        if export.weights == "int4":
            return cls(Coding("blocks", 4, export.block), None, eight)
        if export.inputs == "block":
            return cls(eight, None, eight)
        return cls(Coding("dynamic", 8, per_channel=export.per_channel), eight, eight)

    @property
    def tried(self) -> tuple[Coding, ...]:
        """What is measured for the blocks' linears."""
        return (self.usual,) if self.careful is None else (self.usual, self.careful)


@dataclass(frozen=True)
class Choice:
    """How every matrix is held.

    Attributes:
        codings: by full name, embedding and head among them.
        limit: the relative error above which a linear is held with care.
        reasons: of the linears that are.
    """

    codings: Mapping[str, Coding]
    limit: float
    reasons: Mapping[str, str]


def choose(
    model: StreamedModel, forms: Forms, losses: Mapping[str, Loss], limit: float, careful_limit: float
) -> Choice:
    """Hold with care what the usual form would change by more than `limit`.

    Args:
        model: whose matrices they are.
        forms: between which to choose.
        losses: of the blocks' linears and the head, by full name; empty for float32.
        limit: of the relative error of a linear's outputs in the usual form.
        careful_limit: the same in the careful form; what is above stays float32.
    """
    family = model.family
    codings: dict[str, Coding] = {}
    reasons: dict[str, str] = {}
    for name, loss in losses.items():
        codings[name] = forms.usual
        if forms.careful is None or name == family.head or loss.relative(forms.usual) <= limit:
            continue
        error = loss.relative(forms.careful)
        codings[name] = forms.careful if error <= careful_limit else FLOAT32
        reasons[name] = (
            f"its outputs would differ by {loss.relative(forms.usual):.3g} with one scale for all inputs; the limit is "
            f"{limit:.3g}"
        )
        if error > careful_limit:
            reasons[name] += f". With a scale for each block by {error:.3g}; the limit is {careful_limit:.3g}"
    return Choice({**codings, family.embeddings: forms.outer, family.head: forms.outer}, limit, reasons)


def operators(model: StreamedModel, choice: Choice, losses: Mapping[str, Loss]) -> tuple[ExportedOperator, ...]:
    """One line for each matrix that is stored; a head that is tied is the embedding."""
    family = model.family
    tied = f"{family.head}.weight" not in model.tensors
    rows = []
    for name, coding in choice.codings.items():
        if name == family.head and tied:
            continue
        loss = losses.get(family.head if tied and name == family.embeddings else name)
        error = 0.0 if coding == FLOAT32 else None
        if loss is not None and coding in loss.errors:
            error = loss.relative(coding)
        shape = loss.shape if loss is not None else model.tensors[f"{name}.weight"].shape
        rows.append(
            ExportedOperator(
                name=name,
                coding=coding.name,
                bytes=stored_bytes(shape, coding),
                relative_error=error,
                reason=choice.reasons.get(name),
            )
        )
    return tuple(rows)
