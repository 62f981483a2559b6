"""A byte that the worker's main process shares with the pool processes it forks: set when the worker shall stop."""

import mmap

_flag = mmap.mmap(-1, 1)  # anonymous and shared: a fork inherits the memory itself, not a copy


def request_stop() -> None:
    """Tell every supervisor of this worker to stop its job and give it back."""
    _flag[0] = 1


def stopping() -> bool:
    """Whether the worker has been told to stop."""
    return _flag[0] == 1
