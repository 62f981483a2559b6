"""A job's events as one moving bar."""

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
        return client.wait(job_id, on_event=lambda event: console.print(line(event), soft_wrap=True, markup=False))
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("queued", total=100.0)

        def on_event(event: JobEvent) -> None:
            percent = event.data.get("percent")
            progress.update(task, description=event.message, completed=percent)
            if event.level != "info":
                progress.console.print(line(event), soft_wrap=True, markup=False)

        return client.wait(job_id, on_event=on_event)


def line(event: JobEvent) -> str:
    """One event as one line."""
    percent = event.data.get("percent")
    done = f"{percent:5.1f} %" if isinstance(percent, int | float) else " " * 7
    level = "" if event.level == "info" else f"{event.level}: "
    return f"{event.sequence:4d} {done}  {level}{event.message}"
