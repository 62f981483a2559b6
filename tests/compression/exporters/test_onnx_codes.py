"""Codes against float64, and the imitation of onnxruntime's operators against the operators themselves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnxruntime import InferenceSession

from compression.exporters.onnx.codes import FLOAT32, Coding, block_codes, decoded, embedding, encode, product
from compression.exporters.onnx.files import write_graph
from compression.exporters.onnx.sensitivity import coded_inputs
from compression.exporters.onnx.trace import GraphBuilder
from compression.runtime.onnx_session import GRAPH

CODINGS = [
    FLOAT32,
    Coding("dynamic", 8),
    Coding("dynamic", 8, per_channel=False),
    Coding("blocks", 8, 16),
    Coding("blocks", 8, 64),
    Coding("blocks", 4, 32),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(builder: GraphBuilder, output: ir.Value, folder: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    output.dtype, output.shape = ir.DataType.FLOAT, ir.Shape([1, None, None])
    builder.graph.outputs.append(output)
    write_graph(ir.Model(builder.graph, ir_version=10), folder)
    result: np.ndarray = InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    return result


def multiplied(weight: torch.Tensor, rows: torch.Tensor, coding: Coding, folder: Path) -> np.ndarray:
    left = ir.val("x", dtype=ir.DataType.FLOAT, shape=[1, "tokens", weight.shape[1]])
    builder = GraphBuilder([left])
    output = product(builder, left, "y", "linear", tuple(weight.shape), lambda: weight, coding)
    return run(builder, output, folder, {"x": rows[None].numpy()})[0]


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding.name)
@pytest.mark.parametrize("shape", [(48, 64), (30, 72)])
def test_the_operator_computes_what_was_measured(tmp_path: Path, coding: Coding, shape: Sequence[int]) -> None:
    weight, rows = random(*shape), random(7, shape[1], seed=1)
    weight[3], rows[2, 5] = 0.0, 30.0  # an output of zeros, an input far from the others
    held = weight if coding.kind == "float32" else decoded(encode(weight, coding), coding, shape[1])
    expected = (coded_inputs(rows, coding).double() @ held.double().T).numpy()
    got = multiplied(weight, rows, coding, tmp_path)
    # a tie may be rounded to the other side: one step of one input, times its weight
    np.testing.assert_allclose(got, expected, rtol=0, atol=0.02 * float(np.abs(expected).max()))
    assert np.abs(got - expected).mean() < 1e-3 * np.abs(expected).mean()


@pytest.mark.parametrize("coding", CODINGS[1:], ids=lambda coding: coding.name)
def test_codes_are_the_nearest_points_of_their_grid(coding: Coding) -> None:
    weight = random(6, 64, seed=2)
    codes = encode(weight, coding)
    scales = codes.scales.double()
    steps = scales[:, None].expand(6, 64) if coding.kind == "dynamic" else scales.repeat_interleave(coding.block, 1)
    error = (decoded(codes, coding, 64).double() - weight.double()).abs()
    slack = 1.0 if coding.bits == 4 else 0.5  # the offset of 4 bits is rounded too
    assert (error <= steps * slack * (1 + 1e-5)).all()


def test_four_bit_blocks_span_from_the_smallest_weight_to_the_largest() -> None:
    """By hand: −3 … 12 in 15 steps of 1, zero is code 3."""
    weight = torch.tensor([[-3.0, 12.0, *([0.0] * 13), 5.0]])
    codes = block_codes(weight, 4, 16)
    assert codes.scales.tolist() == [[1.0]]
    assert codes.offsets is not None
    assert codes.offsets.tolist() == [[3]]
    assert codes.values[0, 0].tolist() == [0 | 15 << 4, *([3 | 3 << 4] * 6), 3 | 8 << 4]
    assert torch.equal(decoded(codes, Coding("blocks", 4, 16), 16), weight)


@pytest.mark.parametrize("width", [64, 40])
def test_rows_of_an_embedding_are_the_very_weights_of_the_head(tmp_path: Path, width: int) -> None:
    table, coding = random(20, width, seed=3), Coding("blocks", 8, 32)
    ids = ir.val("ids", dtype=ir.DataType.INT64, shape=[1, "tokens"])
    builder = GraphBuilder([ids])
    output = embedding(builder, ids, "y", "table", (20, width), lambda: table, coding)
    got = run(builder, output, tmp_path, {"ids": np.array([[4, 0, 19]])})[0]
    np.testing.assert_array_equal(got, decoded(encode(table, coding), coding, width)[[4, 0, 19]].numpy())
    before = dict(builder.graph.initializers)
    product(builder, ids, "head", "table", (20, width), lambda: table, coding)
    added = builder.graph.initializers.keys() - before.keys()
    assert all(name.startswith("numbers_") for name in added)


def test_an_outlier_costs_one_scale_for_all_more_than_scales_for_blocks() -> None:
    weight, rows = random(32, 64, seed=5), random(16, 64, seed=6)
    rows[0, 0] = 500.0
    exact = rows.double() @ weight.double().T
    lost = {
        coding.kind: float((coded_inputs(rows, coding).double() @ weight.double().T - exact)[1:].norm())
        for coding in (Coding("dynamic", 8), Coding("blocks", 8, 32))
    }
    assert lost["dynamic"] > 20 * lost["blocks"]
