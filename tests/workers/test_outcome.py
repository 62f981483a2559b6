"""A full disk is known by its number, or by its name where a library gives no number."""

import errno

import pytest

from workers.outcome import is_disk_full


def _caused_by(error: BaseException) -> BaseException:
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = error
    return wrapped


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (_caused_by(OSError(errno.ENOSPC, "full")), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (_caused_by(ValueError("a bug")), False),
    ],
)
def test_a_full_disk_is_recognised(error: BaseException, full: bool) -> None:
    assert is_disk_full(error) is full
