"""`python -m tests.chaos [--faults 28] [--seed 1] [--seconds 600] [--shape both]` ends with a line `CHAOS …`.

Shapes: `sqlite` and `postgresql`, each with Redis, two workers and the API as processes. Exit status 1 when
an artifact is wrong, or a job lost or stuck.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests import servers
from tests.chaos.campaign import Outcome, campaign, chosen
from tests.chaos.field import field_of

SHAPES = ("sqlite", "postgresql")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--faults", type=int, default=28, help="how many; fewer where the time runs out")
    parser.add_argument("--seed", type=int, default=1, help="of kinds, order and moments")
    parser.add_argument("--seconds", type=float, default=600.0, help="no fault begins later than this")
    parser.add_argument("--shape", choices=(*SHAPES, "both"), default="both")
    parser.add_argument("--results", type=Path, help="append a line of JSON for each fault")
    asked = parser.parse_args(arguments)
    shapes = SHAPES if asked.shape == "both" else (asked.shape,)
    started, outcomes = time.monotonic(), list[Outcome]()
    for number, shape in enumerate(shapes):
        deadline = started + asked.seconds * (number + 1) / len(shapes)
        count = asked.faults // len(shapes) + (number < asked.faults % len(shapes))
        for outcome in _run(shape, count, random.Random(f"{asked.seed} {shape}"), deadline):
            outcomes.append(outcome)
            print(f"{shape:10s} {_in_words(outcome)}", flush=True)
            _append(asked.results, {"shape": shape, "seed": asked.seed, **outcome.row()})
    print(summary(outcomes))
    return 0 if outcomes and all(outcome.verdict == "recovered" for outcome in outcomes) else 1


def _in_words(one: Outcome) -> str:
    said = f"{one.fault:26s} {one.moment:22s} {one.verdict:10s} attempts {one.attempts}"
    return f"{said}, moved again after {one.recovery_seconds:6.2f} s"


def summary(outcomes: Sequence[Outcome]) -> str:
    """The last line."""
    counts = {
        verdict: sum(one.verdict == verdict for one in outcomes) for verdict in ("recovered", "wrong", "lost", "stuck")
    }
    worst = max((one.recovery_seconds for one in outcomes), default=0.0)
    said = " ".join(f"{verdict}={count}" for verdict, count in counts.items())
    return f"CHAOS faults={len(outcomes)} {said} worst_recovery_seconds={worst:.2f}"


def _run(shape: str, count: int, chance: random.Random, deadline: float) -> Iterator[Outcome]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modepress-chaos-")))
        changes: dict[str, Any] = {}
        if shape == "postgresql":
            server = stack.enter_context(servers.postgres_server())
            changes["database_url"] = stack.enter_context(servers.postgres_database(server))
        field = stack.enter_context(field_of(folder, **changes))
        undisturbed = field.artifact(field.ended(field.submit()))
        yield from campaign(field, undisturbed, chosen(count, shape, chance), chance, deadline)


def _append(path: Path | None, row: dict[str, Any]) -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as results:
            results.write(json.dumps({**row, "date": time.strftime("%Y-%m-%d")}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
