"""The process that imports one family's published files: `python -m workers.import_model <folder>`.

Reads `<folder>/request.json`, leaves the model in `<folder>/model/` and `<folder>/result.json`. Nothing in the files
runs (`compression.importers.pickled`); what is written is safetensors alone.
"""

import sys
from pathlib import Path

from compression.importers.families import import_originals
from workers.arrival import REQUEST, bring
from workers.description import ImportDescription
from workers.lifeline import die_with_supervisor


def main(folder: Path) -> int:
    """Import, check and say how it went; returns the exit status."""
    die_with_supervisor()
    request = ImportDescription.model_validate_json((folder / REQUEST).read_bytes())
    return bring(folder, lambda target: import_originals(request.originals, target))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
