"""What a running job says of itself every few seconds, and whether it moves."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.base import Frozen
from api_schemas.events import Stage

Work = Literal["load", "forward", "statistics", "solve", "write", "verify", "evaluate", "other"]
"""What time goes to. `load`: weights and texts read; `verify`: fresh processes that reload and generate."""


class Pulse(Frozen):
    """What the job process says while it works; sent only when it has moved."""

    number: Annotated[int, Field(description="of steps begun or ended so far; grows only when the process moves")]
    stage: Stage | None = None
    block: int | None = None
    module: str | None = None
    work: Work
    tokens: Annotated[int, Field(description="run through a block so far, by this attempt")]
    flops: Annotated[float, Field(description="of these forward passes: multiply-adds times two")]
    gpu_memory_bytes: int | None = None


class Heartbeat(Frozen):
    """One look of the supervisor at its job process; written also when the process is deep in one long call."""

    at: Annotated[float, Field(description="seconds since 1970")]
    attempt: int
    fence: int
    worker: str
    host: str
    pid: Annotated[int, Field(description="of the supervisor")]
    child_pid: int
    child_alive: bool
    stage: str | None = None
    block: Annotated[int | None, Field(description="index of the decoder block under work")] = None
    module: str | None = None
    work: Work | None = None
    tokens_done: int = 0
    tokens_per_second: Annotated[
        float | None, Field(description="tokens through one block, since the heartbeat before; null where none ran")
    ] = None
    flops_per_second: Annotated[float | None, Field(description="of forward passes alone, likewise")] = None
    mfu: Annotated[
        float | None,
        Field(description="flops_per_second by the peak that setting peak_flops states; null where it is unknown"),
    ] = None
    rss_bytes: int | None = None
    gpu_memory_bytes: Annotated[int | None, Field(description="null where the process uses no GPU")] = None
    disk_free_bytes: int
    progress_number: Annotated[int, Field(description="grows only when the process moves")] = 0
    progress_age_seconds: Annotated[float, Field(description="since it last moved")]
    stalls_after_seconds: Annotated[float, Field(description="at this age the process is dumped and killed")]
    last_log_lines: Annotated[tuple[str, ...], Field(max_length=20)] = ()
    keywords: Annotated[dict[str, int], Field(description="words of trouble in the log so far, with their count")]


def in_words(beat: Heartbeat) -> str:
    """A heartbeat in one line."""
    block = None if beat.block is None else f"block {beat.block + 1}"
    place = " ".join(part for part in (beat.stage, block, beat.module, beat.work) if part)
    facts = [place or "no step yet"]
    if beat.tokens_per_second is not None:
        facts.append(f"{beat.tokens_per_second:.0f} tokens/s")
    if beat.flops_per_second is not None:
        facts.append(f"{beat.flops_per_second / 1e9:.1f} GFLOP/s")
    if beat.mfu is not None:
        facts.append(f"MFU {beat.mfu:.1%}")
    if beat.rss_bytes is not None:
        facts.append(f"{beat.rss_bytes / 1e9:.2f} GB resident")
    if beat.gpu_memory_bytes is not None:
        facts.append(f"{beat.gpu_memory_bytes / 1e9:.2f} GB on the GPU")
    facts.append(f"last moved {beat.progress_age_seconds:.0f} s before")
    if beat.keywords:
        facts.append("log speaks of " + ", ".join(sorted(beat.keywords)))
    return "; ".join(facts)
