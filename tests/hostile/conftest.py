"""The tiny model that the API's tests share."""

from tests.service.conftest import tiny_folder

__all__ = ["tiny_folder"]
