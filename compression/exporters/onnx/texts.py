"""What an export is chosen and judged on."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Texts:
    """Token ids `[windows, tokens]`: on which to choose, and on which to judge."""

    calibration: Tensor
    evaluation: Tensor
