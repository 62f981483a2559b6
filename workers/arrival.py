"""How a process that brings a model ends: facts of a sound checkpoint, or an error that a user can read."""

from collections.abc import Callable
from pathlib import Path

from api_schemas.errors import ModepressError
from job_store.layout import sync_tree, write_whole
from preflight.checkpoint import describe, open_checkpoint
from workers.description import EXIT_DISK_FULL, EXIT_FAILED, EXIT_OK, RESULT, FetchResult
from workers.outcome import is_disk_full

REQUEST = "request.json"
MODEL = "model"


def bring(folder: Path, make: Callable[[Path], None]) -> int:
    """Let `make` write `<folder>/model/`, check it, and leave `<folder>/result.json`; returns the exit status."""
    try:
        make(folder / MODEL)
        facts = describe(open_checkpoint(folder / MODEL))
        sync_tree(folder / MODEL)
        result = FetchResult(facts=facts.model_dump(mode="json"), error=None)
    except ModepressError as error:
        result = FetchResult(facts=None, error=error.body())
    except Exception as error:
        if is_disk_full(error):
            return EXIT_DISK_FULL
        raise
    write_whole(folder / RESULT, result.model_dump_json().encode())
    return EXIT_OK if result.error is None else EXIT_FAILED
