"""The `metadata[key]=value` filter of job lists."""

import re

from starlette.requests import Request

from api_schemas.errors import InvalidRequest

FILTER = re.compile(r"^metadata\[(.{1,64})\]$", re.DOTALL)
MAX_PAIRS = 16


def metadata_of(request: Request) -> dict[str, str]:
    """Return the pairs asked for. Raises InvalidRequest when a key is malformed or there are too many."""
    pairs = {}
    for name, value in request.query_params.multi_items():
        if not name.startswith("metadata"):
            continue
        found = FILTER.match(name)
        if found is None:
            message = f"query parameter {name[:120]!r} is malformed; write metadata[key]=value with a key of 1 to 64"
            raise InvalidRequest("invalid_value", message, "metadata")
        pairs[found.group(1)] = value
    if len(pairs) > MAX_PAIRS:
        raise InvalidRequest("invalid_value", f"metadata has {len(pairs)} pairs; {MAX_PAIRS} are allowed", "metadata")
    return pairs
