"""What a job leaves on disk, and how it goes away once the job has ended."""

import json
from contextlib import suppress
from pathlib import Path

from sqlalchemy import Engine

from api_schemas.jobs import TERMINAL
from job_store.database import reading
from job_store.layout import Layout, remove_tree
from job_store.tables import JobRow, ModelRow

LOG = "log.txt"
DESCRIPTION = "job.json"


def sweep(engine: Engine, layout: Layout) -> None:
    """Clear the folders of all jobs that have ended or were deleted: their worker may have died before it could."""
    jobs = layout.home / "jobs"
    for folder in sorted(jobs.iterdir()) if jobs.exists() else ():
        if _has_leftovers(folder) and _ended(engine, folder.name):
            clear_job(engine, layout, folder.name)


def clear_job(engine: Engine, layout: Layout, job_id: str) -> None:
    """Remove an ended job's blocks, attempts and unregistered artifact; its description and last log stay."""
    folder = layout.job(job_id)
    for attempt in attempts(folder):
        with suppress(FileNotFoundError):  # no log yet, or the reaper of another process is clearing too
            (attempt / LOG).replace(folder / LOG)
        remove_tree(attempt)
    remove_tree(layout.blocks(job_id))
    _remove_unregistered(engine, layout, folder / DESCRIPTION)


def attempts(job_folder: Path) -> list[Path]:
    """Return the attempt folders of a job, the oldest fence first."""
    found = job_folder.glob("attempt-*")
    return sorted(found, key=lambda path: int(path.name.removeprefix("attempt-")))


def _has_leftovers(folder: Path) -> bool:
    return (folder / "blocks").exists() or bool(attempts(folder))


def _ended(engine: Engine, job_id: str) -> bool:
    with reading(engine) as session:
        row = session.get(JobRow, job_id)
        return row is None or row.status in TERMINAL


def _remove_unregistered(engine: Engine, layout: Layout, description: Path) -> None:
    # the folder of an artifact that was moved into place by a worker that died before its transaction was committed
    if not description.exists():
        return
    model_id = json.loads(description.read_bytes())["compressed_model"]
    with reading(engine) as session:
        if session.get(ModelRow, model_id) is None:
            remove_tree(layout.model(model_id))
