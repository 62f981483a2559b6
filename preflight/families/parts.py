"""The parts of a decoder block by name, relative to the block."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """Names of a block's attention linears, relative to the block, and of the norms over a head's channels."""

    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"

    @property
    def module(self) -> str:
        """The module that holds the linears."""
        return self.query.rpartition(".")[0]


@dataclass(frozen=True)
class Mlp:
    """Names of a block's MLP linears, relative to the block: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))`."""

    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The linears whose output channels are the MLP's units."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def numbered(self, expert: int) -> "Mlp":
        """The names of one of several experts."""
        gate = None if self.gate is None else self.gate.format(expert)
        return Mlp(gate, self.up.format(expert), self.down.format(expert))


USUAL_ATTENTION = Attention()
USUAL_MLP = Mlp()


@dataclass(frozen=True)
class Fused:
    """Linears stored as one tensor: their rows one part after the other, or, by head, each head's rows of all parts."""

    stored: str
    parts: tuple[str, ...]
    by_head: bool = False


@dataclass(frozen=True)
class Experts:
    """MLPs side by side, of which a router chooses some for each token; their names in `Mlp` hold the number as `{}`.

    Attributes:
        count: configuration keys of their number, old and new.
        chosen: configuration key of how many each token sees.
        router: the linear that chooses.
        module: the module that holds them.
    """

    count: tuple[str, ...]
    chosen: str = "num_experts_per_tok"
    router: str = "mlp.gate"
    module: str = "mlp.experts"
