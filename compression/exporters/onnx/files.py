"""A graph on disk: `model.onnx` with its nodes, `model.onnx.data` with its tensors, one in memory at a time."""

import os
from pathlib import Path

import onnx_ir as ir

from compression.runtime.onnx_session import DATA, GRAPH

ALIGNMENT = 64
SMALL = 1024  # bytes; tensors below stay among the nodes, where a reader sees the constants


def write_graph(model: ir.Model, folder: Path) -> None:
    """Write a graph into an existing folder, durably; its tensors then refer to the file.

    Tensors lie outside the graph at any size: protobuf ends at 2 GB.
    """
    outside: dict[str, tuple[int, int]] = {}
    path = folder / DATA
    with path.open("wb") as file:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < SMALL:
                continue
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            outside[name] = file.tell(), tensor.nbytes
            file.write(tensor.tobytes())
        file.flush()
        os.fsync(file.fileno())
    for name, (offset, length) in outside.items():
        value = model.graph.initializers[name]
        tensor = value.const_value
        assert tensor is not None  # noqa: S101 (it was written above)
        value.const_value = ir.ExternalTensor(
            DATA, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name, base_dir=folder
        )
    ir.save(model, folder / GRAPH)
    with (folder / GRAPH).open("rb+") as file:
        os.fsync(file.fileno())
