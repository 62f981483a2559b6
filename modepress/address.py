"""Where the server is: said by the user, or found through the data folder of a running `modepress up`."""

import json
import os
from pathlib import Path

from modepress.client import DEFAULT_URL


def home() -> Path:
    """The data folder: `MODEPRESS_HOME`, else ./.modepress."""
    return Path(os.environ.get("MODEPRESS_HOME", ".modepress")).expanduser().resolve()


def server_url() -> str:
    """`MODEPRESS_URL`; else the stack that runs on this data folder; else http://127.0.0.1:8000."""
    said = os.environ.get("MODEPRESS_URL")
    if said:
        return said
    path = home() / "stack.json"
    return str(json.loads(path.read_text())["url"]) if path.is_file() else DEFAULT_URL
