"""Bytes land whole or not at all; a full disk has a name."""

import os
import threading
from pathlib import Path

import pytest

from api_schemas.errors import InsufficientStorage, TooLarge
from job_store.landing import Landing, disk_errors, exclusive

LIMIT = TooLarge("file_too_large", "too large", "file")


def test_a_landing_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with Landing(tmp_path / "a", limit=10, too_large=LIMIT, what="a") as landing:
        landing.write(b"123")
    assert list(tmp_path.iterdir()) == []


def test_the_limit_is_exact(tmp_path: Path) -> None:
    with Landing(tmp_path / "a", limit=4, too_large=LIMIT, what="a") as landing:
        landing.write(b"1234")
        with pytest.raises(TooLarge, match="too large"):
            landing.write(b"5")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named() -> None:
    """/dev/full is the kernel's own full disk."""
    with pytest.raises(InsufficientStorage, match="no space left in the data folder for the model") as caught:
        with disk_errors("the model"), Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")
    assert (caught.value.code, caught.value.status) == ("disk_full", 507)


def test_other_disk_errors_go_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors("x"):
        os.stat(tmp_path / "missing")


def test_the_lock_excludes_threads(tmp_path: Path) -> None:
    inside: list[int] = []
    overlaps: list[int] = []

    def work() -> None:
        for _ in range(50):
            with exclusive(tmp_path / "lock"):
                inside.append(1)
                if len(inside) > 1:
                    overlaps.append(1)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == []
