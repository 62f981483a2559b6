"""The before/after table of a report, for people."""

from rich.console import Group, RenderableType

from api_schemas.reports import CompressionReport, MeasuredPair
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
        f"against the original: mean KL {divergence.mean_kl:.4f}, 99th percentile {divergence.kl_99th_percentile:.3f} "
        f"nats per token; same first choice on {divergence.top1_agreement:.1%} of tokens",
        f"calibrated on {report.calibration.tokens_used} tokens ({report.calibration.source}), "
        f"judged on {report.evaluation.tokens_used} others ({report.evaluation.source})",
        f"reloaded in a fresh process by {report.reload.loader}: logits differ by at most "
        f"{report.reload.max_logit_difference:.2g} (tolerance {report.reload.tolerance:.2g})",
        *(f"exported {one.target}: {output.size(one.bytes)}, {one.architecture}" for one in report.exports),
        f"took {output.seconds(report.seconds)}, {output.size(report.peak_rss_bytes)} of memory at most",
        *(f"warning: {warning}" for warning in report.warnings),
    ]
    return Group(output.table(("", ">before", ">after", ">change"), rows), "", *lines)


def _change(before: float, after: float) -> str:
    return f"{(after - before) / before:+.1%}" if before else ""


def _measured(name: str, pair: MeasuredPair, form: output.Form) -> tuple[str, str, str, str]:
    if pair.before is None or pair.after is None:
        return (name, "not measured", "not measured", pair.reason or "")
    return (name, form(pair.before), form(pair.after), _change(pair.before, pair.after))
