"""Tensors from safetensors files, one at a time, by plain reads: nothing stays mapped, so memory is what it says."""

import torch
from torch import Tensor

from api_schemas.errors import InvalidCheckpoint
from compression.core.linalg import all_finite
from preflight.safetensors_header import TensorEntry

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def read_tensor(entry: TensorEntry) -> Tensor:
    """Read one tensor in its stored dtype.

    Raises:
        InvalidCheckpoint: `unsupported_dtype`, `truncated_tensor` or `non_finite_weights`, naming the tensor.
    """
    if entry.dtype not in DTYPES:
        raise InvalidCheckpoint(
            "unsupported_dtype", f"{entry.name}: dtype {entry.dtype} cannot be compressed; store it as BF16", entry.name
        )
    buffer = bytearray(entry.end - entry.start)
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        read = file.readinto(buffer)
    if read != len(buffer):
        raise InvalidCheckpoint(
            "truncated_tensor", f"{entry.name}: {entry.file.name} ends after {read} of {len(buffer)} bytes", entry.name
        )
    tensor = torch.frombuffer(buffer, dtype=DTYPES[entry.dtype]).reshape(entry.shape)
    if tensor.is_floating_point() and not all_finite(tensor):
        raise InvalidCheckpoint(
            "non_finite_weights",
            f"{entry.name} holds NaN or infinity; the checkpoint is damaged: export or download it again",
            entry.name,
        )
    return tensor
