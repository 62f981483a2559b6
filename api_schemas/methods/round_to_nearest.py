"""Settings of rounding to nearest: the baseline of weight quantisation."""

from typing import Literal

from api_schemas.methods.weight_grid import WeightGrid


class RoundToNearestConfig(WeightGrid):
    """Each weight becomes the nearest point of its grid; the calibration text only measures what that costs."""

    method: Literal["round_to_nearest"]
