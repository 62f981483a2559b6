"""trace: a job's time line into a file."""

from pathlib import Path
from typing import Annotated

import typer

from modepress import output
from modepress.commands.options import ApiKey, AsJson, Url, connect


def trace(
    job_id: Annotated[str, typer.Argument(metavar="JOB")],
    into: Annotated[
        Path | None, typer.Option(help="File to write; default: ./JOB.trace.json.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Export a job's time line: a file for https://ui.perfetto.dev or chrome://tracing; also while the job runs."""
    path = into if into is not None else Path(f"{job_id}.trace.json")
    with connect(url, api_key) as client:
        found = client.trace(job_id)
    path.write_text(found.model_dump_json(), encoding="utf-8")
    events = len(found.traceEvents)
    done = {"job": job_id, "into": str(path.resolve()), "events": events}
    output.show(done, as_json=as_json, human=lambda: f"{events} events in {path}; open it at https://ui.perfetto.dev")
