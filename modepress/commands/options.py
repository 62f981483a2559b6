"""Options that several commands share."""

from typing import Annotated

import typer

from modepress.address import server_url
from modepress.client import Client

AsJson = Annotated[bool, typer.Option("--json", help="Machine output: JSON on stdout, nothing else there.")]
Url = Annotated[
    str | None,
    typer.Option("--url", help="Server; default: MODEPRESS_URL, or the stack running here.", show_default=False),
]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="MODEPRESS_API_KEY", help="Key.", show_envvar=True)]


def connect(url: str | None, api_key: str | None) -> Client:
    """Open a client to the server the user named, or the one that runs here."""
    return Client(url or server_url(), api_key)
