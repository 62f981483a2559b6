"""A plan, for people."""

import re
from collections.abc import Sequence

from rich.console import Group, RenderableType

from api_schemas.plans import Plan, QuantizedModule
from modepress import output


def plan_table(plan: Plan) -> RenderableType:
    """Lay out what a recipe would do."""
    counts = (
        ("parameters", plan.parameters_before, plan.parameters_after, output.count),
        ("  of the blocks", plan.block_parameters_before, plan.block_parameters_after, output.count),
        ("bytes of weights", plan.bytes_before, plan.bytes_after, output.size),
    )
    rows = [
        (name, form(before), form(after), f"{(after - before) / before:+.1%}" if before else "")
        for name, before, after, form in counts
    ]
    time_needed = f"about {output.seconds(plan.estimated_seconds)} ({plan.estimate_basis})"
    lines = [
        *_narrowing(plan),
        *output.parts(plan.parts),
        *(
            f"step {number} of {len(plan.steps)}, {one.method}: {output.size(one.bytes_before)} of weights become "
            f"{output.size(one.bytes_after)}"
            for number, one in enumerate(plan.steps, start=1)
            if len(plan.steps) > 1
        ),
        *_quantized(plan.quantized),
        f"needs {output.size(plan.peak_memory_bytes)} of memory and {output.size(plan.disk_bytes)} of disk; "
        f"time: {time_needed}",
        *(f"in {one.runtime}: {one.status.replace('_', ' ')} ({one.reason})" for one in plan.runtimes),
        *(f"note: {note}" for note in plan.notes),
        *(f"warning: {warning}" for warning in plan.warnings),
        *(f"cannot run: {blocker.code}: {blocker.message}" for blocker in plan.blockers),
    ]
    return Group(output.table(("", ">now", ">then", ">change"), rows), "", *lines)


def _quantized(modules: Sequence[QuantizedModule]) -> list[str]:
    """The resolved list of a quantisation: linears that differ only in their numbers share a line."""
    alike: dict[tuple[str, int | None, int, int, str | None], int] = {}
    for one in modules:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", one.module)
        key = (pattern, one.bits, one.bytes_before, one.bytes_after, one.kept_by)
        alike[key] = alike.get(key, 0) + 1
    return [
        f"  {count} × {pattern}: "
        + (
            f"kept by {kept_by!r}, {output.size(after)}"
            if bits is None
            else f"{bits} bits, {output.size(before)} become {output.size(after)}"
        )
        for (pattern, bits, before, after, kept_by), count in alike.items()
    ]


def _narrowing(plan: Plan) -> list[str]:
    if not plan.modules:
        return ["every width stays"]
    return [f"sparsity of the blocks: {_sparsity(plan)}, in {', '.join(plan.modules)}"]


def _sparsity(plan: Plan) -> str:
    if plan.sparsity_requested is None:
        return "not known before the trials"
    return f"{plan.sparsity_planned:.4f} (asked {plan.sparsity_requested:.6g})"
