"""From a claim to a job folder in which a job process can start."""

import os
from collections.abc import Iterator

from sqlalchemy.orm import Session

from api_schemas.errors import NotFound
from api_schemas.recipe import Recipe
from job_store.database import reading
from job_store.layout import remove_tree, write_whole
from job_store.leases import Claim
from job_store.leftovers import DESCRIPTION, attempts
from job_store.tables import FileRow, ModelRow
from preflight.estimates import CHUNK_TOKENS
from workers.description import JobDescription
from workers.naming import compressed_name
from workers.workplace import Workplace

SMALLER = 4  # after running out of memory, one in so many tokens is run at once


def describe_job(place: Workplace, claim: Claim) -> JobDescription:
    """Look up what a job process needs to know.

    Raises:
        NotFound: the model or an uploaded text was deleted after the job was submitted.
    """
    with reading(place.engine) as session:
        source = session.get(ModelRow, claim.model)
        if source is None or source.status != "ready":
            raise NotFound(
                "model_not_found",
                f"model {claim.model!r} is gone or not ready; register it, then submit again",
                "model",
            )
        files = {file_id: str(place.layout.blob(_digest(session, file_id))) for file_id in _file_ids(claim.recipe)}
        name = compressed_name(
            claim.model, claim.recipe, claim.suffix, claim.job_id, lambda name: _taken(session, name, claim)
        )
        path = source.path
    return JobDescription(
        job_id=claim.job_id,
        model=claim.model,
        compressed_model=name,
        source=path,
        recipe=claim.recipe,
        files=files,
        roots=tuple(str(root) for root in place.settings.roots),
        hub_offline=place.settings.hub_offline,
        threads=place.settings.threads or os.cpu_count() or 1,
        fence=claim.fence,
        chunk_tokens=CHUNK_TOKENS // (SMALLER if claim.memory_retries else 1),
        device=place.settings.device,
    )


def make_attempt_folder(place: Workplace, claim: Claim, description: JobDescription) -> None:
    """Create the folder of this attempt and remove those of earlier ones; the blocks they finished stay.

    Raises:
        OSError: the disk is full, for one.
    """
    folder = place.layout.job(claim.job_id)
    place.layout.blocks(claim.job_id).mkdir(parents=True, exist_ok=True)
    place.layout.trace(claim.job_id).mkdir(exist_ok=True)
    for earlier in attempts(folder):
        remove_tree(earlier)
    place.layout.attempt(claim.job_id, claim.fence).mkdir()
    write_whole(folder / DESCRIPTION, description.model_dump_json(indent=2).encode())


def _file_ids(recipe: Recipe) -> Iterator[str]:
    for source in (recipe.calibration, recipe.evaluation):
        if source.file_id is not None:
            yield source.file_id


def _digest(session: Session, file_id: str) -> str:
    row = session.get(FileRow, file_id)
    if row is None:
        raise NotFound("file_not_found", f"file_id: there is no file {file_id!r}; upload it again", "recipe")
    return row.sha256


def _taken(session: Session, name: str, claim: Claim) -> bool:
    row = session.get(ModelRow, name)
    return row is not None and row.job != claim.job_id
