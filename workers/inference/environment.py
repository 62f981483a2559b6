"""What must be in the environment before torch is imported."""

import os
from collections.abc import MutableMapping

from job_store.settings import Settings


def available_cores() -> int:
    """Return the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def chosen_threads(settings: Settings) -> int:
    """Return the number of CPU threads: the setting, or the cores there are when it is 0."""
    return settings.threads or available_cores()


def prepare_environment(settings: Settings, environment: MutableMapping[str, str]) -> None:
    """Set thread counts, passive waiting and offline mode. Values the operator has set himself stay.

    OpenMP reads its variables when its library is loaded, so this comes before the first `import torch`. Threads that
    spin while they wait (the default) make a token loop many times slower next to another busy process.
    """
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment["HF_HUB_OFFLINE"] = "1"  # models come from local folders alone
    if settings.threads:
        environment["OMP_NUM_THREADS"] = str(settings.threads)
    environment.setdefault("OMP_NUM_THREADS", str(available_cores()))
