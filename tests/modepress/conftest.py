"""One stack for the tests of client and command line: small parts, so that even a tiny model needs several."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from modepress import Client
from tests.modepress.running_stack import RunningStack, running_stack
from tests.tiny_models import make_tiny_model

PART_BYTES = 16 * 1024


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    home = tmp_path_factory.mktemp("stack") / "home"
    with running_stack(home, extra={"MODEPRESS_MAX_PART_BYTES": str(PART_BYTES)}) as running:
        yield running


@pytest.fixture
def client(stack: RunningStack, tmp_path: Path) -> Iterator[Client]:
    with Client(stack.url, journal=tmp_path / "pushes") as opened:
        yield opened


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(stack: RunningStack, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The id of a tiny model that has been pushed."""
    with Client(stack.url, journal=tmp_path_factory.mktemp("journal")) as opened:
        return opened.push(tiny_folder).id
