"""`python -m workers.inference --host 127.0.0.1 --port 8001`: the inference process; settings by `MODEPRESS_*`."""

import argparse
import logging
import math
import os
from types import FrameType

import uvicorn
from fastapi import FastAPI

from job_store.settings import Settings
from workers.inference.environment import chosen_threads, prepare_environment

KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, so that they never send into a closing one


class DrainingServer(uvicorn.Server):
    """Ends generations at their next token as soon as a signal asks the process to stop."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain the engine, then let uvicorn close its connections."""
        app = self.config.app
        engine = getattr(app.state, "engine", None) if isinstance(app, FastAPI) else None
        if engine is not None:
            engine.drain()
        super().handle_exit(sig, frame)


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m workers.inference", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    arguments = parser.parse_args()
    settings = Settings()
    prepare_environment(settings, os.environ)
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    import torch  # after the environment is prepared
    import transformers

    from workers.inference.app import create_app

    torch.set_num_threads(chosen_threads(settings))
    transformers.utils.logging.disable_progress_bar()
    grace = max(1, math.ceil(settings.cancel_grace_seconds))
    config = uvicorn.Config(
        create_app(settings),
        host=arguments.host,
        port=arguments.port,
        log_level=settings.log_level.lower(),
        timeout_graceful_shutdown=grace,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    DrainingServer(config).run()


if __name__ == "__main__":
    main()
