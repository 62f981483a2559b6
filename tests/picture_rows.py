"""Rows of pictures and words for tests."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (33, 40)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    image.save(held, kind)
    return held.getvalue()


def in_row(image: Image.Image) -> dict[str, str]:
    return {"bytes": base64.b64encode(file_of(image)).decode()}


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mixed_rows(count: int) -> list[dict[str, Any]]:
    """Two rows of three have a picture; texts differ in length."""
    return [
        {"image": in_row(picture(seed)) if seed % 3 else None, "text": f"A picture of number {seed}. " * (1 + seed % 4)}
        for seed in range(count)
    ]
