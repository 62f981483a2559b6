"""From a recipe to a queued job: planned first, refused by name when something stands in the way."""

import logging
import shutil
from typing import Literal

from api_schemas.calibration import TextSource
from api_schemas.errors import InvalidRecipe, ModepressError
from api_schemas.jobs import Job, JobRequest
from api_schemas.plans import Blocker, Plan
from api_schemas.recipe import Recipe
from job_store.json_logs import about
from job_store.model_paths import resolve_text_under_roots
from job_store.sending import require_broker, send
from preflight.checkpoint import open_checkpoint
from preflight.plans import make_plan, recipe_hash
from service.deps import Stores

logger = logging.getLogger(__name__)


def plan(stores: Stores, model: str, recipe: Recipe) -> Plan:
    """Say what a recipe would do to a model; what stands in the way is listed, not raised.

    Raises:
        NotFound, Conflict: the model does not exist, or is not ready.
        InvalidCheckpoint: its files changed since it was registered.
    """
    checkpoint = open_checkpoint(stores.models.path_of(model))
    drawn = make_plan(checkpoint, recipe, model=model, flops_per_second=stores.jobs.flops_per_second())
    blockers = [*drawn.blockers, *_text_blockers(stores, recipe)]
    free = shutil.disk_usage(stores.layout.home).free
    if drawn.disk_bytes > free:
        message = f"the job needs {drawn.disk_bytes} bytes of disk, {free} are free in the data folder; free some space"
        blockers.append(Blocker(code="disk_full", message=message))
    return drawn.model_copy(update={"blockers": tuple(blockers)})


def submit(stores: Stores, request: JobRequest, idempotency_key: str | None) -> tuple[Job, bool]:
    """Store and send a job; returns it and whether it is new. A replay is answered as it was, whatever changed since.

    Raises:
        InvalidRecipe: a blocker of the plan, by its own code; further ones are counted in the message.
        Unavailable: no broker is configured. One that is merely away gets the id later.
        InvalidRequest: `idempotency_key_reused`.
        TooManyRequests, NotPermitted: the owner's quota of jobs or bytes is used up.
    """
    first_job = None if idempotency_key is None else stores.jobs.replayed(request, idempotency_key)
    if first_job is not None:
        return first_job, False
    require_broker(stores.settings)
    drawn = plan(stores, request.model, request.recipe)
    blockers = drawn.blockers
    if blockers:
        first = blockers[0]
        more = f" (and {len(blockers) - 1} more; POST /v1/compression/plans lists them)" if blockers[1:] else ""
        raise InvalidRecipe(first.code, first.message + more, first.param)
    fingerprint = recipe_hash(request.recipe, request.model)
    job, created = stores.jobs.create(
        request, recipe_hash=fingerprint, idempotency_key=idempotency_key, artifact_bytes=drawn.bytes_after
    )
    if created:
        with about(job_id=job.id):
            logger.info("job %s was submitted", job.id)
        send(job.id, "compress", stores.settings)
    return job, created


def _text_blockers(stores: Stores, recipe: Recipe) -> list[Blocker]:
    blockers = []
    texts: tuple[tuple[Literal["calibration", "evaluation"], TextSource], ...] = (
        ("calibration", recipe.calibration),
        ("evaluation", recipe.evaluation),
    )
    for role, text in texts:
        try:
            _check_text(stores, text, f"recipe.{role}")
        except ModepressError as error:
            blockers.append(Blocker(code=error.code, message=error.message, param=error.param))
    return blockers


def _check_text(stores: Stores, text: TextSource, param: str) -> None:
    if text.path is not None:
        resolve_text_under_roots(text.path, stores.settings.roots, f"{param}.path")
    if text.file_id is not None:
        stores.files.get(text.file_id, param=f"{param}.file_id")
    if text.dataset is not None and stores.settings.hub_offline:
        message = f"{param}.dataset {text.dataset!r} cannot be downloaded: this server is offline; upload the text"
        raise InvalidRecipe("hub_offline", message, f"{param}.dataset")
