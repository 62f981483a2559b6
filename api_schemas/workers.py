"""Workers, and what each found of itself when it started."""

from typing import Annotated, Literal

from pydantic import Field

from api_schemas.base import Frozen

Standing = Literal["ready", "failed", "unchecked"]


class SelfCheck(Frozen):
    """One thing that a worker tried of itself before it took work."""

    name: str
    result: Annotated[
        Literal["ok", "warn", "fail", "skipped"], Field(description="`fail` keeps the worker out of the queue")
    ]
    detail: Annotated[str, Field(description="what was found, and what to do about it")]
    value: float | None = None
    unit: str | None = None


class Worker(Frozen):
    """A worker process that was started."""

    id: str
    object: Literal["worker"] = "worker"
    name: Annotated[str, Field(description="its name among Celery's nodes")]
    worker_class: Annotated[str, Field(description="processor or GPU: what its rates are compared within")]
    started_at: int
    seen_at: Annotated[int, Field(description="it says so every 15 s")]
    alive: Annotated[bool, Field(description="seen within the last minute, and not stopped")]
    standing: Annotated[Standing, Field(description="`failed` takes no work; `unchecked`: the check was switched off")]
    slow_blocks: Annotated[int, Field(description="in a row, of its job now or last; 3 make a straggler")] = 0
    checks: tuple[SelfCheck, ...]
    seconds: Annotated[float, Field(description="that the check took")]
