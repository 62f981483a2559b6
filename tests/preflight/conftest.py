"""Fresh copies of tiny models for each test to break."""

import shutil
from pathlib import Path

import pytest

from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "plain": make_tiny_model(folder / "plain"),
        "tied": make_tiny_model(folder / "tied", tied=True),
        "sharded": make_tiny_model(folder / "sharded", max_shard_size="20KB"),
    }


@pytest.fixture
def model(made: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made["plain"], tmp_path / "model")


@pytest.fixture
def tied(made: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made["tied"], tmp_path / "tied")


@pytest.fixture
def sharded(made: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made["sharded"], tmp_path / "sharded")
