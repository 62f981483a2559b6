"""Brings hostile files to our doors, one forked process each, under limits of memory and CPU time.

python -m tests.hostile.doors        # reads one JSON object per line: door, path, place; writes one per line
"""

import json
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from api_schemas.errors import ModepressError
from compression.core.image_decoding import decode
from compression.importers.gguf import convert
from compression.importers.pickled import read_pickle
from preflight.checkpoint import describe, open_checkpoint

MORE_MEMORY = 768 * 1024**2  # above what the interpreter and its libraries have mapped already
CPU_SECONDS = 20
MAX_PIXELS = 4096 * 4096


def _checkpoint(path: Path) -> object:
    return describe(open_checkpoint(path)).blockers


def _gguf(path: Path) -> object:
    return convert(path, path.parent / "converted")


DOORS: dict[str, Callable[[Path], object]] = {
    "checkpoint": _checkpoint,
    "pickled": read_pickle,
    "gguf": _gguf,
    "image": lambda path: decode(path.read_bytes(), MAX_PIXELS),
}


def _try(door: str, path: Path) -> dict[str, Any]:
    try:
        passed = DOORS[door](path)
    except ModepressError as error:
        return {"code": error.code, "param": error.param, "message": error.message}
    except BaseException as error:  # noqa: BLE001  (what the test wants to see)
        return {"code": None, "message": "".join(traceback.format_exception(error))[-1500:]}
    blockers = [blocker.code for blocker in passed] if isinstance(passed, tuple) else []
    return {"code": blockers[0] if blockers else None, "message": f"passed: {passed!r}"[:500]}


def _child(door: str, path: Path, place: Path, answer: int) -> None:
    mapped = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MORE_MEMORY, mapped + MORE_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0) if door != "gguf" else (10**6, 10**6))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(place)  # what a pickle runs would leave its mark here
    tempfile.tempdir = str(place)
    os.write(answer, json.dumps(_try(door, path)).encode())


def _bring(door: str, path: Path, place: Path) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _child(door, path, place, writing)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status, usage = os.wait4(child, 0)
    found: dict[str, Any] = json.loads(said) if said else {"code": None, "message": f"it died: status {status}"}
    return {**found, "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 3), "peak_rss": usage.ru_maxrss * 1024}


def main() -> None:
    """Serve until the input ends; the first line says how large the process is before anything hostile comes."""
    sys.stdout.write(json.dumps({"rss": psutil.Process().memory_info().rss}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        wanted = json.loads(line)
        found = _bring(wanted["door"], Path(wanted["path"]), Path(wanted["place"]))
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
