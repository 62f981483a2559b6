"""The process that downloads one model from the hub: `python -m workers.fetch_model <folder>`.

Reads `<folder>/request.json`, leaves the files in `<folder>/model/` and `<folder>/result.json`. Only weights in
safetensors, JSON and tokenizer files are asked for: nothing that could run.
"""

import sys
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from api_schemas.errors import InvalidRequest, NotFound, NotPermitted, Unavailable
from job_store.layout import remove_tree
from workers.arrival import REQUEST, bring
from workers.description import FetchDescription
from workers.lifeline import die_with_supervisor

WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "README.md")


def main(folder: Path) -> int:
    """Download, check and say how it went; returns the exit status."""
    die_with_supervisor()
    request = FetchDescription.model_validate_json((folder / REQUEST).read_bytes())
    return bring(folder, lambda target: download(request, target))


def download(request: FetchDescription, target: Path) -> None:
    """Download a snapshot's wanted files into `target`.

    Raises:
        InvalidRequest: `hub_offline`, this server may not ask the hub.
        NotFound: `hub_model_not_found` or `hub_revision_not_found`.
        NotPermitted: `hub_model_gated`.
        Unavailable: `hub_unreachable`.
    """
    hub_id = request.hub_id
    if request.hub_offline or constants.HF_HUB_OFFLINE:
        raise InvalidRequest("hub_offline", f"hub_id {hub_id!r}: {OFFLINE}", "hub_id")
    try:
        snapshot_download(hub_id, revision=request.revision, local_dir=target, allow_patterns=list(WANTED))
    except GatedRepoError as error:
        message = f"hub_id {hub_id!r} is gated; set HF_TOKEN of an account that may read it in the worker's environment"
        raise NotPermitted("hub_model_gated", message, "hub_id") from error
    except RevisionNotFoundError as error:
        message = f"hub_id {hub_id!r} has no revision {request.revision!r}; leave it out or name one that exists"
        raise NotFound("hub_revision_not_found", message, "revision") from error
    except RepositoryNotFoundError as error:
        message = f"hub_id {hub_id!r} does not exist or needs a token; check its spelling"
        raise NotFound("hub_model_not_found", message, "hub_id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError) as error:
        message = f"hub_id {hub_id!r}: the hub does not answer ({type(error).__name__}); check the network, or {REMEDY}"
        raise Unavailable("hub_unreachable", message, "hub_id") from error
    remove_tree(target / ".cache")  # the client's own book-keeping, not part of the model


REMEDY = "upload the files, or register a server-side path"
OFFLINE = f"this server is offline (MODEPRESS_HUB_OFFLINE, HF_HUB_OFFLINE) and downloads nothing; {REMEDY}"

if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
