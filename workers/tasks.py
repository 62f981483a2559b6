"""The tasks: a supervisor each, never the work itself. Every one is safe to deliver twice."""

from workers.app import app
from workers.fetching import Fetcher
from workers.shutdown import stopping
from workers.supervisor import Supervisor
from workers.workplace import workplace


@app.task(name="workers.tasks.compress")
def compress(job_id: str) -> None:
    """Run a compression job to its end, unless another worker holds it."""
    Supervisor(workplace(), stopping=stopping).run(job_id)


@app.task(name="workers.tasks.fetch_model")
def fetch_model(model_id: str) -> None:
    """Download a registered model from the hub, unless that has been done."""
    Fetcher(workplace(), stopping=stopping).run(model_id)
