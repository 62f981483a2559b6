"""From a traced torch module to nodes of a larger ONNX graph."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.utils import _pytree as pytree

OPSET = 20


@dataclass(frozen=True)
class Part:
    """A traced module.

    Attributes:
        graph: its nodes, in an order in which they can be computed.
        inputs: names of its inputs, one per tensor of the arguments.
    """

    graph: ir.Graph
    inputs: tuple[str, ...]


def trace(module: nn.Module, arguments: tuple[Any, ...], shapes: tuple[Any, ...], names: Sequence[str]) -> Part:
    """Trace a module once.

    Args:
        module: computes from its arguments alone.
        arguments: examples; nested tuples and dicts of tensors.
        shapes: for each argument, which dimensions may change: torch.export's `dynamic_shapes`.
        names: of the tensors among the arguments, in their order.
    """
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(), arguments, dynamo=True, verbose=False, opset_version=OPSET, dynamic_shapes=shapes
        )
    if program is None:
        raise AssertionError("torch.onnx.export with dynamo=True returns a program")
    graph = program.model.graph
    given = len(pytree.tree_leaves(arguments))
    if len(graph.inputs) != given or len(names) != given:
        raise AssertionError(f"{type(module).__name__}: {len(graph.inputs)} inputs of {given} are in the graph")
    return Part(graph, tuple(names))


class GraphBuilder:
    """A growing graph; every value in it has a name that says where it belongs."""

    def __init__(self, inputs: Sequence[ir.Value]) -> None:
        """Begin with the model's inputs."""
        self.graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": OPSET, "com.microsoft": 1}, name="modepress")

    def tensor(self, name: str, value: Any) -> ir.Value:
        """An initializer; the same name twice is the same tensor."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        constant = ir.val(name, dtype=value.dtype, shape=value.shape, const_value=value)
        self.graph.register_initializer(constant)
        return constant

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        output: str | Sequence[str],
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Append a node; returns its output, or all of them where several are named."""
        names = [output] if isinstance(output, str) else list(output)
        made = ir.node(
            op, inputs, attributes, domain=domain, outputs=[ir.val(name) for name in names], name=f"{names[0]}/{op}"
        )
        self.graph.append(made)
        return made.outputs[0] if isinstance(output, str) else made.outputs

    def graft(
        self, part: Part, prefix: str, given: Mapping[str, ir.Value], replaced: Mapping[str, Any] | None = None
    ) -> list[ir.Value]:
        """Append a copy of a part's nodes.

        Args:
            part: the traced part.
            prefix: of the names of its inner values.
            given: what its inputs are here, by name.
            replaced: by name of an input: a function that makes the product `x · input` of a MatMul in its own way.

        Returns:
            What its outputs are here.
        """
        replaced = replaced or {}
        known: dict[ir.Value, ir.Value] = {}
        products = {}
        for value, name in zip(part.graph.inputs, part.inputs, strict=True):
            if name in replaced:
                products[value] = replaced[name]
            else:
                known[value] = given[name]
        for name, value in part.graph.initializers.items():
            known[value] = self.tensor(f"{prefix}{name}", value.const_value)
        for node in part.graph:
            name = f"{prefix}{node.outputs[0].name}"
            if node.op_type == "MatMul" and node.inputs[1] in products:
                left = node.inputs[0]
                known[node.outputs[0]] = products[node.inputs[1]](self, known[left], name)  # type: ignore[index]
                continue
            outputs = self.node(
                node.op_type,
                [None if value is None else known[value] for value in node.inputs],
                [f"{prefix}{value.name}" for value in node.outputs],
                node.domain,
                **{key: attribute.value for key, attribute in node.attributes.items()},
            )
            known.update(zip(node.outputs, outputs, strict=True))
        return [known[value] for value in part.graph.outputs]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports on packages that are absent and on its own internals; none of it is about the model."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.__trace")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
