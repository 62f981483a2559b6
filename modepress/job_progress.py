"""A job's events as one moving bar, or as lines where nothing can move."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from api_schemas.events import JobEvent
from api_schemas.jobs import Job
from modepress.client import Client


def follow(client: Client, job_id: str, *, console: Console, quiet: bool) -> Job:
    """Show a job until it has ended, and return it. On a terminal a bar moves; elsewhere each event is a line."""
    if quiet:
        return client.wait(job_id)
    if not console.is_terminal:
        return client.wait(job_id, on_event=lambda event: _print(console, event))
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("queued", total=100.0)

        def on_event(event: JobEvent) -> None:
            if event.level == "info":
                # events of the service itself, such as a change of status, say nothing about how far the job is
                progress.update(task, description=event.message, completed=event.data.get("percent"))
            else:
                _print(progress.console, event)

        return client.wait(job_id, on_event=on_event)


def line(event: JobEvent) -> str:
    """One event as one line."""
    level = "" if event.level == "info" else f"{event.level}: "
    return f"{event.sequence:4d}  {level}{event.message}"


def _print(console: Console, event: JobEvent) -> None:
    console.print(line(event), soft_wrap=True, markup=False)
