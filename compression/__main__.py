"""`python -m compression SOURCE TARGET --recipe recipe.json --report report.json`: the same, without the service.

`torchrun --nproc-per-node N -m compression …` shares the calibration between N processes.

Exit status: 0 done, 2 refused (bad model, recipe, text or arguments), 4 failed, 5 the quality gate failed.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads slow torch down 16-fold beside a busy process

from pydantic import ValidationError

from api_schemas.errors import ErrorResponse, JobFailed, ModepressError, place_of
from api_schemas.events import ProgressEvent
from api_schemas.recipe import Recipe
from compression.core.block_store import write_durably
from compression.core.parallel import Group, joined
from compression.judgement import GateFailed
from compression.pipeline import assist, compress


class _Terminal:
    """Prints each event on standard error."""

    def emit(self, event: ProgressEvent) -> None:
        """Write one line."""
        sys.stderr.write(f"{event.percent:5.1f}%  {event.stage}: {event.message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one compression; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m compression", description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("source", type=Path, help="model folder: config.json, safetensors, tokenizer")
    parser.add_argument("target", type=Path, help="folder to create")
    parser.add_argument("--recipe", type=Path, required=True, help="recipe as JSON")
    parser.add_argument("--report", type=Path, required=True, help="where the report is written")
    parser.add_argument("--blocks", type=Path, help="where finished blocks are kept; default is beside the target")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N, or auto: a GPU where there is one")
    parser.add_argument("--rank-timeout", type=float, default=1800.0, help="seconds one rank waits for another")
    asked = parser.parse_args(arguments)
    try:
        with joined(asked.rank_timeout) as group:
            return _run(asked, group)
    except ModepressError as error:
        sys.stderr.write(ErrorResponse(error=error.body()).model_dump_json() + "\n")
        if isinstance(error, GateFailed):
            _write_report(asked.report, error.report.model_dump_json(indent=2))
            return 5
        return 4 if isinstance(error, JobFailed) else 2


def _run(asked: argparse.Namespace, group: Group) -> int:
    import torch

    from compression.core.placement import choose_device

    if asked.target.exists():
        raise ModepressError("target_exists", f"{asked.target} exists; name a folder that does not", "target")
    device = choose_device(asked.device, int(os.environ.get("LOCAL_RANK", "0")))
    if asked.threads:
        torch.set_num_threads(asked.threads)
    asked.target.parent.mkdir(parents=True, exist_ok=True)
    recipe, source, target = _read_recipe(asked.recipe), asked.source.resolve(), asked.target.resolve()
    blocks = (asked.blocks or asked.target.with_name(f".{asked.target.name}.blocks")).resolve()
    if group.rank:
        assist(recipe, source, target, model=source.name, blocks=blocks, group=group, device=device)
        return 0
    report = compress(
        recipe,
        source,
        target,
        model=source.name,
        blocks=blocks,
        progress=_Terminal(),
        files={},
        roots=None,
        hub_offline=False,
        group=group,
        device=device,
    )
    _write_report(asked.report, report.model_dump_json(indent=2))
    sys.stdout.write(
        f"perplexity {report.perplexity.before:.3f} -> {report.perplexity.after:.3f}, parameters "
        f"{report.parameters.before} -> {report.parameters.after}, {report.seconds:.1f} s, {asked.target}\n"
    )
    return 0


def _read_recipe(path: Path) -> Recipe:
    draft: Any = None
    try:
        draft = json.loads(path.read_text(encoding="utf-8"))
        return Recipe.model_validate(draft)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModepressError("recipe_unreadable", f"{path}: {error}", "recipe") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in ("recipe", *place_of(first, draft)))
        raise ModepressError("invalid_value", f"{where}: {first['msg']}, not {first['input']!r}", where) from error


def _write_report(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, (text + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
