"""Runs a command that dies when the process that started it dies. Executed as a file, before any import of ours.

    python -I -S leash.py <pid of the starter> <signal number> <command> …

Linux sends the signal by itself (PR_SET_PDEATHSIG, kept across exec). Elsewhere the command runs as it is, and the
starter's own clean shutdown is all there is.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Put the leash on and become the command."""
    starter, death_signal, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != int(starter):  # it died before the leash was on
            sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606 (becoming the command is the point)


if __name__ == "__main__":
    main()
