"""What a command on the server's machine leaves in the audit log."""

import getpass
import os

from sqlalchemy import Engine

from job_store.audit import AuditLog


def note(engine: Engine, owner: str, action: str, target: str | None = None) -> None:
    """Write down who ran which command."""
    AuditLog(engine).record(f"cli:{_user()}"[:64], owner, action, target=target)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a number without a name
        return str(os.getuid())
