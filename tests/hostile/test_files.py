"""Each hostile file gets its named refusal, in bounded time and memory; nothing is run, nothing is left behind."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.corpus import CASES, MARKER, Case

MORE_RSS = 600 * 1024**2  # above the preloaded process: a header of four million values is the largest that is parsed


@dataclass(frozen=True)
class Doors:
    """The preloaded process that forks once per case."""

    process: subprocess.Popen[str]
    rss: int

    def bring(self, door: str, path: Path, place: Path) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"door": door, "path": str(path), "place": str(place)}) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


@pytest.fixture(scope="module")
def doors() -> Iterator[Doors]:
    command = [sys.executable, "-m", "tests.hostile.doors"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Doors(process, json.loads(process.stdout.readline())["rss"])
        assert process.stdin is not None
        process.stdin.close()


def _listing(place: Path) -> list[tuple[str, int]]:
    return sorted((str(path.relative_to(place)), path.lstat().st_mtime_ns) for path in place.rglob("*"))


def test_the_corpus_is_large_and_its_names_are_unique() -> None:
    assert len(CASES) >= 60
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused_by_name(case: Case, doors: Doors, tmp_path: Path) -> None:
    path = case.make(tmp_path)
    before = _listing(tmp_path)
    found = doors.bring(case.door, path, tmp_path)
    assert found["code"] in case.codes, found["message"]
    assert len(found["message"]) < 800
    assert not (tmp_path / MARKER).exists()
    assert _listing(tmp_path) == before
    assert found["peak_rss"] < doors.rss + MORE_RSS
