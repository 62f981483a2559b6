"""What the command's exit status says, so that scripts can rely on it. docs/how-to/scripting.md shows each."""

from enum import IntEnum

from modepress.api_error import ModepressApiError


class ExitCode(IntEnum):
    """Exit status of `modepress`."""

    OK = 0
    SERVER_OR_UNKNOWN = 1
    USAGE = 2
    REFUSED = 3
    JOB_FAILED = 4
    GATE_FAILED = 5
    UNREACHABLE = 6


def of_error(error: ModepressApiError) -> ExitCode:
    """Which status a refused or failed request ends with."""
    return ExitCode.UNREACHABLE if error.status == 0 else of_status(error.status)


def of_status(status: int) -> ExitCode:
    """Which status an error with this HTTP status ends with, whether a server or this side found it."""
    return ExitCode.REFUSED if 400 <= status < 500 else ExitCode.SERVER_OR_UNKNOWN


def of_job(status: str, error_code: str | None) -> ExitCode:
    """Which status a finished job ends with; a cancelled job counts as failed."""
    if status == "succeeded":
        return ExitCode.OK
    return ExitCode.GATE_FAILED if error_code == "quality_gate" else ExitCode.JOB_FAILED
