"""A block whose result looks wrong is solved again, from the embeddings on, and the results are compared bit by bit.

The same result twice: it is the data's own ("correct"), however odd. Another result: something went wrong once, as a
flipped bit does ("transient"); a third run must then agree with one of the two, and that one counts. The idea is that
of Megatron-LM's rerun state machine (megatron/core/rerun_state_machine.py), which tries another GPU too; here there is
one device.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined] # documented there

from api_schemas.errors import JobFailed
from api_schemas.reports import Rerun
from compression.core.protocols import BlockResult, BlockStore, Step, Walker
from compression.core.timeline import span

NEIGHBOURS, FEWEST = 5, 3  # blocks before it whose errors a block's is compared with
TIMES, FLOOR = 10.0, 0.01  # above their median so many times, and not negligible: suspicious
FAULTS = ("not_finite", "not_positive")


@dataclass(frozen=True)
class _Tried:
    """What one run made of a block: a step, or the fault in which it ended."""

    step: Step | None
    fault: Exception | None = None

    @property
    def error(self) -> float:
        """Its relative output error; NaN where it has none."""
        return math.nan if self.step is None else self.step.relative_output_error

    def same(self, other: "_Tried") -> bool:
        """Whether two runs came to the same, to the bit."""
        if self.step is None or other.step is None:
            return self.step is other.step and str(self.fault) == str(other.fault)
        one, two = self.step.solution.state, other.step.solution.state
        return one.keys() == two.keys() and all(_same_bits(one[name], two[name]) for name in one)

    def settled(self, index: int) -> Step:
        """Its step, or its fault raised by name."""
        if self.step is not None and math.isfinite(self.error):
            return self.step
        if isinstance(self.fault, JobFailed):
            raise self.fault
        raise JobFailed(
            "not_finite",
            f"block {index + 1}: what was measured of it is not a finite number; the model's weights or activations "
            "overflow on this text: try other text, or look at the checkpoint",
        ) from self.fault


class Careful:
    """A walker under suspicion: it solves and replays, and what looks wrong is solved again.

    Attributes:
        state: the original tensors of the block that was solved last.
    """

    def __init__(
        self,
        walker: Walker,
        load: Callable[[int], dict[str, Tensor]],
        again: Callable[[], Walker] | None,
        store: BlockStore,
    ) -> None:
        """Begin with a fresh walker.

        Args:
            walker: at the embeddings.
            load: reads a block's original tensors; read again for each run, for what was read may be what is wrong.
            again: makes another such walker; None solves nothing twice, as among ranks, which must all do the same.
            store: has the finished blocks before the one that is solved again.
        """
        self._walker, self._load, self._again, self._store = walker, load, again, store
        self.state: dict[str, Tensor] = {}
        self._errors: list[float] = []

    def replay_(self, index: int, result: BlockResult) -> None:
        """Pass a block that was finished before."""
        self._walker.replay_(index, result)
        self._errors.append(result.report.relative_output_error)

    def solve_(self, index: int) -> tuple[Step, Rerun | None]:
        """Solve one block and pass it.

        Raises:
            JobFailed: `not_finite` and its like where that is the data's own; `block_not_reproducible` when no two
                runs of three agree.
        """
        first = self._try(index)
        reason = _suspicion(first, self._errors)
        if reason is None or self._again is None:
            step, rerun = first.settled(index), None
        else:
            step, rerun = self._solve_again_(index, first, reason)
        self._errors.append(step.relative_output_error)
        return step, rerun

    def _solve_again_(self, index: int, first: _Tried, reason: str) -> tuple[Step, Rerun]:
        second = self._from_the_start(index)
        tries, counted = [first, second], second
        if not first.same(second):
            third = self._from_the_start(index)
            tries, counted = [*tries, third], third
            if not (third.same(first) or third.same(second)):
                raise JobFailed(
                    "block_not_reproducible",
                    f"block {index + 1} came out differently in each of 3 runs ({reason}): this worker's processor or "
                    "memory is not to be trusted; run the job on another (modepress workers lists their checks)",
                )
        return counted.settled(index), Rerun(
            reason=reason,
            verdict="correct" if len(tries) == len((first, second)) else "transient",
            errors=tuple(one.error if math.isfinite(one.error) else None for one in tries),
        )

    def _from_the_start(self, index: int) -> _Tried:
        """Solve with a walker that has seen nothing yet; the one before is let go first."""
        assert self._again is not None  # noqa: S101 (asked before)
        del self._walker
        with span("other", "rerun", block=index):
            self._walker = self._again()
            for before in range(index):
                result = self._store.get(before)
                if result is None:
                    raise RuntimeError(f"block {before} vanished from the block store")
                self._walker.replay_(before, result)
            return self._try(index)

    def _try(self, index: int) -> _Tried:
        self.state = self._load(index)
        try:
            return _Tried(self._walker.solve_(index, self.state))
        except JobFailed as fault:
            if fault.code not in FAULTS:
                raise
            return _Tried(None, fault)
        except (ValidationError, LinAlgError) as fault:  # a report that holds NaN; an SVD of NaN
            return _Tried(None, fault)


def _suspicion(tried: _Tried, before: Sequence[float]) -> str | None:
    """Why a result should be looked at again, if it should."""
    if tried.step is None:
        return f"its solve failed: {str(tried.fault).splitlines()[0]}"
    tensors = tried.step.solution.state.values()
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point()):
        return "its weights are not finite"
    if not math.isfinite(tried.error):
        return "its error is not finite"
    near = before[-NEIGHBOURS:]
    if len(near) >= FEWEST and tried.error > max(FLOOR, TIMES * statistics.median(near)):
        return (
            f"its error {tried.error:.3g} is over {TIMES:g} times the {statistics.median(near):.3g} of its neighbours"
        )
    return None


def _same_bits(one: Tensor, two: Tensor) -> bool:
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))
