"""The vision tower of mPLUG-2: CLIP's ViT over the frames of a clip, with small convolutions over time in each block.

What differs from the published modules, with the same outputs: query, key and value are three linears, and the
convolutions of one pixel (patches, and into and out of the bottleneck over time) are linears too, so that whatever
walks over linears finds them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

HEAD_DIM = 64  # the published code has as many heads as this goes into the width
CHANNELS = 3


def quick_gelu(states: Tensor) -> Tensor:
    """CLIP's approximation x·σ(1.702x), which is not the usual one."""
    return states * torch.sigmoid(1.702 * states)


class OverTime(nn.Module):
    """What a patch learns from the same patch of the frames before and after, through half the width."""

    def __init__(self, width: int) -> None:
        """Make it for states of `width`."""
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, width // 2)
        self.mix = nn.Conv1d(width // 2, width // 2, kernel_size=3, padding=1, groups=width // 2)
        self.up = nn.Linear(width // 2, width)

    def forward(self, patches: Tensor) -> Tensor:
        """Map `[clips, frames, patches, width]` to the same shape, its input added."""
        clips, _, places, _ = patches.shape
        narrow = self.down(self.norm(patches)).permute(0, 2, 3, 1).flatten(0, 1)  # [clips · patches, half, frames]
        mixed = quick_gelu(self.mix(narrow)).unflatten(0, (clips, places)).permute(0, 3, 1, 2)
        result: Tensor = patches + self.up(mixed)
        return result


class VideoBlock(nn.Module):
    """Patches over time, all tokens of a frame among themselves, patches over time, MLP."""

    def __init__(self, width: int) -> None:
        """Make it for states of `width`."""
        super().__init__()
        self.heads = width // HEAD_DIM
        self.before, self.between = OverTime(width), OverTime(width)
        self.attention_norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        """Map `[clips, frames, 1 + patches, width]` to the same shape; the first token of a frame is its class."""
        states = torch.cat((states[:, :, :1], self.before(states[:, :, 1:])), dim=2)
        normed = self.attention_norm(states)
        query, key, value = (
            linear(normed).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for linear in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        states = states + self.output(mixed.transpose(-2, -3).flatten(-2))
        states = torch.cat((states[:, :, :1], self.between(states[:, :, 1:])), dim=2)
        result: Tensor = states + self.down(quick_gelu(self.up(self.mlp_norm(states))))
        return result


class VideoFormer(nn.Module):
    """Frames → one class token and all patches of all frames."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Build it.

        Args:
            settings: `vision` of the configuration: `width`, `blocks`, `patch` and `image` (in pixels).
        """
        super().__init__()
        width, self.patch = settings["width"], settings["patch"]
        places = (settings["image"] // self.patch) ** 2
        self.patches = nn.Linear(CHANNELS * self.patch**2, width, bias=False)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(places + 1, width))
        self.norm_before = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(VideoBlock(width) for _ in range(settings["blocks"]))
        self.norm_after = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map `[clips, 3, frames, image, image]` to `[clips, 1 + frames · patches, width]`."""
        size = self.patch
        cut = pixels.unfold(3, size, size).unfold(4, size, size)  # [clips, 3, frames, rows, columns, patch, patch]
        patches = self.patches(cut.permute(0, 2, 3, 4, 1, 5, 6).flatten(4).flatten(2, 3))
        first = self.class_token.expand(*patches.shape[:2], 1, -1)
        states = self.norm_before(torch.cat((first, patches), dim=2) + self.positions)
        for block in self.blocks:
            states = block(states)
        tokens = torch.cat((states[:, :, 0].mean(dim=1, keepdim=True), states[:, :, 1:].flatten(1, 2)), dim=1)
        result: Tensor = self.norm_after(tokens)
        return result
