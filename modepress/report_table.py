"""The before/after table of a report, for people."""

from rich.console import Group, RenderableType

from api_schemas.reports import CompressionReport, JobTime, MeasuredPair, SearchReport, TextUse
from modepress import output


def report_table(report: CompressionReport) -> RenderableType:
    """Lay out what a job changed. Every number was measured in the job; what was not says why."""
    counts = (
        ("parameters", report.parameters, output.count),
        ("  of the blocks", report.block_parameters, output.count),
        ("bytes of weights", report.bytes, output.size),
    )
    rows = [("perplexity", f"{report.perplexity.before:.3f}", f"{report.perplexity.after:.3f}",
             _change(report.perplexity.before, report.perplexity.after))]  # fmt: skip
    rows += [
        (name, form(pair.before), form(pair.after), _change(pair.before, pair.after)) for name, pair, form in counts
    ]
    rows.append(_measured("tokens per second", report.tokens_per_second, lambda number: f"{number:.1f}"))
    rows.append(_measured("peak memory, generating", report.peak_memory_bytes, output.size))
    divergence = report.divergence
    lines = [
        *(
            f"step {number} of {len(report.steps)}, {one.method}: {output.count(one.parameters.before)} parameters in "
            f"{output.size(one.bytes.before)} become {output.count(one.parameters.after)} in "
            f"{output.size(one.bytes.after)}; {output.seconds(one.seconds)}"
            for number, one in enumerate(report.steps, start=1)
            if len(report.steps) > 1
        ),
        f"against the original: mean KL {divergence.mean_kl:.4f}, 99th percentile {divergence.kl_99th_percentile:.3f} "
        f"nats per token; same first choice on {divergence.top1_agreement:.1%} of tokens",
        f"calibrated on {report.calibration.tokens_used} tokens{_images(report.calibration)} "
        f"({report.calibration.source}){_roughly(report)}, "
        f"judged on {report.evaluation.tokens_used} others ({report.evaluation.source})",
        f"reloaded in a fresh process by {report.reload.loader}: logits differ by at most "
        f"{report.reload.max_logit_difference:.2g} (tolerance {report.reload.tolerance:.2g})",
        *(f"exported {one.target}: {output.size(one.bytes)}, {one.architecture}" for one in report.exports),
        f"took {output.seconds(report.seconds)}, {output.size(report.peak_rss_bytes)} of memory at most",
        *(() if report.time is None else _spent(report.time)),
        *(f"warning: {warning}" for warning in report.warnings),
    ]
    searched = () if report.search is None else ("", *_frontier(report.search))
    return Group(output.table(("", ">before", ">after", ">change"), rows), "", *lines, *searched)


def _spent(time: JobTime) -> list[str]:
    """Where the job's time went, largest first."""
    largest = sorted(time.spent.items(), key=lambda item: -item[1].seconds)
    parts = [f"{work} {output.seconds(one.seconds)} ({one.share:.0%})" for work, one in largest]
    parts.append(f"lost {output.seconds(time.lost.seconds)} ({time.lost.share:.0%})")
    return [
        f"time of {time.attempts} attempt{'s' if time.attempts > 1 else ''}, {output.seconds(time.wall_seconds)}: "
        + ", ".join(parts),
        f"effective job time rate {time.effective_rate:.1%}",
    ]


def _roughly(report: CompressionReport) -> str:
    dtype = report.recipe.calibration.forward
    return "" if dtype == "float32" else f" with products in {dtype}"


def _frontier(search: SearchReport) -> tuple[RenderableType, ...]:
    """Every trial of a search, from the largest model to the smallest; a star marks what was written."""
    rows = [
        (
            f"{trial.sparsity:.4f}{' *' if at == search.chosen else ''}",
            output.count(trial.parameters),
            f"{trial.predicted_perplexity:.3f}",
            f"{trial.perplexity:.3f}",
            f"{trial.increase:+.1%}",
            "yes" if trial.within_target else "no",
        )
        for at, trial in enumerate(search.frontier)
    ]
    text = (
        f"target: perplexity at most {search.target.perplexity_increase:+.1%}; {len(rows)} trials, measured on "
        f"{search.text.tokens_used} tokens of {search.text.source}, where the original has "
        f"{search.perplexity_before:.3f}"
    )
    table = output.table(("sparsity", ">parameters", ">predicted", ">perplexity", ">change", "met"), rows)
    return (text, table, f"ended because {search.ended}; first predicted from {search.predicted_from}")


def _images(text: TextUse) -> str:
    return f", {text.image_tokens} of them of {text.images} images" if text.images else ""


def _change(before: float, after: float) -> str:
    return f"{(after - before) / before:+.1%}" if before else ""


def _measured(name: str, pair: MeasuredPair, form: output.Form) -> tuple[str, str, str, str]:
    if pair.before is None or pair.after is None:
        shown = ["not measured" if side is None else form(side) for side in (pair.before, pair.after)]
        return (name, shown[0], shown[1], pair.reason or "")
    return (name, form(pair.before), form(pair.after), _change(pair.before, pair.after))
