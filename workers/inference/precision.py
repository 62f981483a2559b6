"""In which number format a model is held: as stored where the hardware is quick at it, else float32.

A CPU without bfloat16 instructions converts every weight on every token; such a CPU gets float32, at twice the bytes.
`/loaded` reports the choice and its reason.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86-64, x86-64, arm64
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Precision:
    """A number format, where the model runs, and why this format."""

    dtype: torch.dtype
    stored: torch.dtype
    device: str
    reason: str

    @property
    def name(self) -> str:
        """The format's name, such as `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")


def cpu_flags() -> frozenset[str]:
    """Return the CPU's feature flags as the Linux kernel names them; empty elsewhere."""
    if not CPU_INFO.is_file():
        return frozenset()
    for line in CPU_INFO.read_text(errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            return frozenset(value.split())
    return frozenset()


def stored_dtype(parameters: Mapping[str, int]) -> torch.dtype:
    """Return the float format that holds most parameters.

    Args:
        parameters: number of parameters by safetensors dtype name (`BF16`, `F32`, …); names of other kinds are ignored.
    """
    floats = {name: count for name, count in parameters.items() if name in STORED}
    return STORED[max(floats, key=lambda name: floats[name])] if floats else torch.float32


def choose_precision(stored: torch.dtype, device: str, flags: frozenset[str]) -> Precision:
    """Choose the number format for a model stored as `stored` on `device` ("cpu" or "cuda")."""
    if stored is torch.float64:
        return Precision(torch.float32, stored, device, "float64 weights are served as float32")
    if device != "cpu":
        return Precision(stored, stored, device, f"as stored, on {device}")
    if stored is torch.float32:
        return Precision(stored, stored, device, "as stored")
    if stored is torch.bfloat16 and (found := sorted(flags & BFLOAT16_FLAGS)):
        return Precision(stored, stored, device, f"as stored; the CPU has {found[0]}")
    name = str(stored).removeprefix("torch.")
    return Precision(torch.float32, stored, device, f"float32, because this {platform.machine()} CPU is slow at {name}")
