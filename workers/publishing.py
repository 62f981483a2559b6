"""From an artifact in an attempt's folder to a registered model."""

import time
from pathlib import Path
from typing import Any

from job_store.layout import Layout, remove_tree, sync_folder
from job_store.leases import Claim
from job_store.tables import ModelRow
from job_store.traces import job_time, read_events
from preflight.checkpoint import describe, open_checkpoint
from workers.description import JobDescription


def artifact_row(layout: Layout, description: JobDescription, artifact: Path) -> ModelRow:
    """Return the row under which an artifact will be registered.

    Raises:
        InvalidCheckpoint: what the job wrote is not a sound checkpoint.
    """
    facts = describe(open_checkpoint(artifact))
    return ModelRow(
        id=description.compressed_model,
        created_at=time.time(),
        status="ready",
        origin="job",
        path=str(layout.model(description.compressed_model)),
        parent=description.model,
        job=description.job_id,
        facts=facts.model_dump(mode="json"),
        error=None,
        request={},
    )


def move_into_place(layout: Layout, artifact: Path, model_id: str) -> None:
    """Rename a finished folder to its place under models/.

    A folder that lies there already was moved by a worker that died before its transaction was committed: no row
    names it, nobody can see it, and it gives way.
    """
    target = layout.model(model_id)
    if target.exists() and not artifact.exists():
        return  # moved by this worker a moment ago, before the database failed to commit
    stale = layout.scratch(model_id)
    if target.exists():
        target.rename(stale)
    artifact.rename(target)
    sync_folder(target.parent)
    remove_tree(stale)


def with_time(layout: Layout, claim: Claim, report: dict[str, Any] | None) -> dict[str, Any] | None:
    """The report of a job that ends now, with where its time went over all attempts."""
    if report is None:
        return None
    events = read_events(layout, claim.job_id)
    spent = job_time(events, began=claim.first_started_at, ended=time.time(), report=report)
    return {**report, "time": spent.model_dump(mode="json")}
