"""The part of a worker's self-check that needs torch: `python -m workers.self_check_process FOLDER DEVICE`.

Disk, memory, rates of matrix products, their correctness and their repeatability, devices, versions. One JSON object on
standard output. The supervisor and its parent import no torch, so this is a process of its own.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from api_schemas.workers import SelfCheck
from compression.core.placement import choose_device
from job_store.layout import sync_folder

MIB = 1024**2
DISK_BYTES, MEMORY_BYTES = 64 * MIB, 128 * MIB
ROOM_BYTES = 1024 * MIB  # less than this free, and no job can end well
CPU_SIDE = 1024  # of the square matrices whose product is timed
GPU_SHAPES = ((8192, 8192, 8192), (4096, 4096, 16384))  # those of Megatron-LM's gpu_sniff_test.py
RUNS, REPEATS = 3, 10
SIDE = 192  # of the matrices whose factors are known
# of float32 and float64 results against float64 truth; a wrong bit above the rounding is orders above these
FLOAT32_ERROR, FLOAT64_ERROR = 2e-6, 1e-11
SHARED = Path("/dev/shm")  # noqa: S108
Multiply = Callable[[Tensor, Tensor], Tensor]


def disk(folder: Path) -> list[SelfCheck]:
    """Write, make durable, rename, read back with a digest."""
    free = shutil.disk_usage(folder).free
    if free < ROOM_BYTES:
        return [SelfCheck(name="disk", result="fail", detail=f"{folder} has {free} bytes free; free some space")]
    content = os.urandom(MIB) * (DISK_BYTES // MIB)
    partial, whole = folder / f"self-check.{os.getpid()}.partial", folder / f"self-check.{os.getpid()}"
    started = time.perf_counter()
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(whole)
        sync_folder(folder)
        rate = DISK_BYTES / (time.perf_counter() - started)
        with whole.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == hashlib.sha256(content).hexdigest()
    except OSError as error:
        return [SelfCheck(name="disk", result="fail", detail=f"{folder} cannot be written: {error.strerror}")]
    finally:
        for path in (partial, whole):
            path.unlink(missing_ok=True)
    said = f"{folder}: {DISK_BYTES // MIB} MiB written, made durable, renamed, read back; {free} bytes free"
    if not same:
        said = f"{folder}: what was read back is not what was written; replace the disk"
    return [SelfCheck(name="disk", result="ok" if same else "fail", detail=said, value=rate, unit="B/s")]


def memory() -> list[SelfCheck]:
    """Copy a tensor larger than caches, and compare."""
    source = torch.arange(MEMORY_BYTES // 8, dtype=torch.float64)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source))
    same = torch.equal(source, target)
    shared = f"; {shutil.disk_usage(SHARED).total // MIB} MiB of {SHARED}" if SHARED.exists() else ""
    detail = f"{MEMORY_BYTES // MIB} MiB copied{shared}"
    if not same:
        detail = "a copy in memory differs from its source; replace the memory"
    rate = 2 * MEMORY_BYTES / seconds
    return [SelfCheck(name="memory", result="ok" if same else "fail", detail=detail, value=rate, unit="B/s")]


def product_rates(device: torch.device) -> list[SelfCheck]:
    """Operations per second of matrix products, per number type; the parent compares them with its class."""
    shapes = ((CPU_SIDE,) * 3,) if device.type == "cpu" else GPU_SHAPES
    dtypes = (torch.float32, torch.float64, torch.bfloat16) if device.type == "cpu" else (torch.float32, torch.bfloat16)
    found = []
    for dtype in dtypes:
        seconds = flops = 0.0
        for m, n, k in shapes:
            a, b = torch.ones(m, k, dtype=dtype, device=device), torch.ones(k, n, dtype=dtype, device=device)
            seconds += median_seconds(partial(torch.matmul, a, b), device)
            flops += 2.0 * m * n * k
        name = f"product {str(dtype).removeprefix('torch.')}"
        sizes = ", ".join("x".join(map(str, shape)) for shape in shapes)
        found.append(
            SelfCheck(name=name, result="ok", detail=f"{sizes} on {device}", value=flops / seconds, unit="FLOP/s")
        )
    return found


def numerics(device: torch.device, multiply: Multiply = torch.matmul) -> list[SelfCheck]:
    """Products against float64 and against themselves; factors that are known beforehand.

    Args:
        device: where to compute.
        multiply: the product under test.
    """
    generator = torch.Generator().manual_seed(20251125)
    a, b = (torch.randn(SIDE, SIDE, generator=generator, dtype=torch.float64) for _ in range(2))
    true = a @ b
    products = [multiply(a.float().to(device), b.float().to(device)).cpu() for _ in range(REPEATS)]
    terms = a.abs() @ b.abs()  # rounding of a sum is in proportion to its terms
    wrong = float(torch.stack([((one.double() - true).abs() / terms).max() for one in products]).max())  # NaN stays
    lower = torch.tril(torch.randn(SIDE, SIDE, generator=generator, dtype=torch.float64), -1) / SIDE
    lower += torch.diag(1 + torch.rand(SIDE, generator=generator, dtype=torch.float64))
    positive = multiply(lower.to(device), lower.T.to(device))
    factor = (torch.linalg.cholesky(positive).cpu() - lower).abs().max()
    left, right = (torch.linalg.qr(one)[0] for one in (a, b))
    values = torch.linspace(2.0, 1.0, SIDE, dtype=torch.float64)
    known = multiply(multiply(left, torch.diag(values)).to(device), right.T.to(device))
    singular = (torch.linalg.svdvals(known).cpu() - values).abs().max()
    same = all(torch.equal(products[0], one) for one in products[1:])
    return [
        _numeric("product against float64", wrong, FLOAT32_ERROR),
        _numeric("Cholesky factor of a known matrix", float(factor), FLOAT64_ERROR),
        _numeric("singular values of a known matrix", float(singular), FLOAT64_ERROR),
        SelfCheck(
            name="determinism",
            result="ok" if same else "fail",
            detail=f"{REPEATS} equal products"
            + (" are equal to the bit" if same else " differ: this processor or its memory is not to be trusted"),
        ),
    ]


def devices() -> list[SelfCheck]:
    """GPUs, as torch sees them."""
    if not torch.cuda.is_available():
        return [SelfCheck(name="gpu", result="skipped", detail="torch sees none")]
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        facts = torch.cuda.get_device_properties(index)
        detail = f"{facts.name}, compute {facts.major}.{facts.minor}, {free} of {total} bytes free"
        found.append(SelfCheck(name=f"gpu {index}", result="ok", detail=detail, value=float(free), unit="B"))
    return found


def versions() -> list[SelfCheck]:
    """What computes here."""
    names = ("modepress", "torch", "transformers", "safetensors")
    said = ", ".join(f"{name} {version(name)}" for name in names)
    cuda = torch.version.cuda or "none"
    return [SelfCheck(name="versions", result="ok", detail=f"python {platform.python_version()}, {said}, CUDA {cuda}")]


def worker_class(device: torch.device) -> str:
    """What rates are compared within: the GPU, or the processor with the threads used of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {torch.get_num_threads()} threads"


def median_seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Median time of a few runs after one that warms up; the device has finished when the clock is read."""
    on_gpu = device is not None and device.type == "cuda"
    times = []
    for _ in range(RUNS + 1):
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return max(1e-9, sorted(times[1:])[RUNS // 2])


def _numeric(name: str, error: float, limit: float) -> SelfCheck:
    good = error <= limit  # NaN is not
    said = f"largest error {error:.2g}, allowed {limit:g}"
    return SelfCheck(
        name=name,
        result="ok" if good else "fail",
        detail=said if good else f"{said}: what this processor computes is wrong; take it out of service",
        value=error if error == error else None,
    )


def main(folder: Path, asked: str) -> None:
    """Check everything, on the device that jobs will have, and say it."""
    device = choose_device(asked)
    checks = [*disk(folder), *memory(), *numerics(device), *product_rates(device), *devices(), *versions()]
    found = {"worker_class": worker_class(device), "checks": [check.model_dump(mode="json") for check in checks]}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
