"""What a user imports and types: the Python client, the command line, and the stack on one machine."""

from modepress.api_error import ModepressApiError, Unreachable
from modepress.client import Client

__all__ = ["Client", "ModepressApiError", "Unreachable"]
