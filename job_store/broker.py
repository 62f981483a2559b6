"""What a broker URL needs to be told: Redis, or the file-system broker of a machine without Redis."""

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

VISIBILITY_SECONDS = 86400  # above the longest job; duplicates are turned away by the claim all the same
REDIS_OPTIONS = {"visibility_timeout": VISIBILITY_SECONDS, "socket_keepalive": True, "health_check_interval": 25}


def broker_options(url: str) -> dict[str, Any]:
    """Return Celery settings for a broker URL (`redis://host:port/0`, or `filesystem:///absolute/folder`)."""
    parts = urlsplit(url)
    if parts.scheme != "filesystem":
        return {"broker_transport_options": REDIS_OPTIONS}
    folder = Path(unquote(parts.path))
    for name in ("messages", "control", "processed"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    options = {
        "data_folder_in": str(folder / "messages"),
        "data_folder_out": str(folder / "messages"),
        "control_folder": str(folder / "control"),
        "processed_folder": str(folder / "processed"),
        "store_processed": False,
    }
    return {"broker_url": "filesystem://", "broker_transport_options": options}
