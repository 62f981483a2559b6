"""Every family with an importer, by its name in a request.

python -m compression.importers.families TARGET_FOLDER < request.json
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from api_schemas.errors import ModepressError
from api_schemas.imports import ImportRequest
from compression.importers import artgpt4, minigpt4, mplug2, tablegpt2, tinygptv

IMPORTERS: Mapping[str, Callable[[Any, Path], dict[str, Any]]] = {
    "tinygptv": tinygptv.convert,
    "minigpt4": minigpt4.convert,
    "artgpt4": artgpt4.convert,
    "tablegpt2": tablegpt2.convert,
    "mplug2": mplug2.convert,
}


def import_originals(request: ImportRequest, target: Path) -> None:
    """Write the model folder `target`, complete or not at all.

    Raises:
        ModepressError: as the family's importer.
    """
    IMPORTERS[request.family](request, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after one line on stderr that names what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m compression.importers.families", description="import originals")
    parser.add_argument("target", type=Path, help="the folder to write; must not exist")
    options = parser.parse_args(arguments)
    try:
        request: ImportRequest = TypeAdapter(ImportRequest).validate_json(sys.stdin.buffer.read())
        import_originals(request, options.target)
    except ValidationError as error:
        first = error.errors()[0]
        sys.stderr.write(f"invalid_request: {'.'.join(map(str, first['loc']))}: {first['msg']}\n")
        return 1
    except ModepressError as error:
        sys.stderr.write(f"{error.code}: {error.message}\n")
        return 1
    sys.stdout.write(f"{options.target}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
