"""Where the numbers live while a model is compressed: on the processor, or on one GPU.

Weights are read into host memory and moved block by block; hidden states, sums and solves stay on the device; what is
kept or written comes back. Inside `placed_on` new tensors are made on the device, so that no algorithm names one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from api_schemas.errors import InvalidRequest

CPU = torch.device("cpu")


def choose_device(asked: str, process: int = 0) -> torch.device:
    """The device of a name.

    Args:
        asked: `auto` (CUDA where there is any, else the processor), `cpu`, `cuda` or `cuda:N`.
        process: of several on this machine, from 0: without an N each takes the next device, round and round.

    Raises:
        InvalidRequest: `device_unknown` for any other name, `device_missing` where torch sees no such device.
    """
    kind, _, number = asked.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdecimal())):
        raise InvalidRequest(
            "device_unknown", f"device {asked!r} is none of auto, cpu, cuda and cuda:N; name one of these", "device"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" or (kind == "auto" and not count):
        return CPU
    if int(number or 0) >= count:  # also when there is none
        seen = f"{count} of them" if count else f"none (torch {torch.__version__})"
        raise InvalidRequest(
            "device_missing",
            f"device {asked!r}: torch sees {seen}; name cpu, or give the process a CUDA device and a torch made for it",
            "device",
        )
    return torch.device("cuda", int(number) if number else process % count)


@contextmanager
def placed_on(device: torch.device) -> Iterator[None]:
    """New tensors are made on `device` for a while."""
    if device.type == "cpu":
        yield
        return
    with device:
        yield


def moved(state: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same tensors on a device; those that are there already are not copied."""
    return {name: tensor.to(device) for name, tensor in state.items()}


def named(device: torch.device) -> str:
    """What a report calls it: `cpu`, or a GPU's number and model."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
