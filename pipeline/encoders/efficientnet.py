"""EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946; Lite as in TensorFlow's tpu repository).

One idea: names and shapes are those of the public PyTorch conversion
(`efficientnet-lite0-57934424`), so its state dict loads strictly. Only the features are used here;
the classifier is kept so that a directory holds the whole model.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

STAGES = (
    # repeats, kernel, stride, expansion, width in, width out
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
FEATURES = 1280


class EfficientNetLite0(nn.Module):
    """Convolutional encoder of 4.65 million parameters, stride 32.

    Args:
        classes: of the ImageNet head.
    """

    def __init__(self, classes: int = 1000):
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        self._blocks = nn.ModuleList(
            _Block(width_out, width_out, kernel, 1, expansion)
            if repeat
            else _Block(width_in, width_out, kernel, stride, expansion)
            for repeats, kernel, stride, expansion, width_in, width_out in STAGES
            for repeat in range(repeats)
        )
        self._conv_head = nn.Conv2d(320, FEATURES, 1, bias=False)
        self._bn1 = _norm(FEATURES)
        self._fc = nn.Linear(FEATURES, classes)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] -> [B, 1280, S / 32, S / 32]."""
        x = F.relu6(self._bn0(self._conv_stem(_pad(pixels, 3, 2))))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """ImageNet logits [B, classes]."""
        return self._fc(self.features(pixels).mean((2, 3)))


class _Block(nn.Module):
    """Inverted residual: expand, depthwise convolution, project."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = width_in * expansion
        self.kernel, self.stride = kernel, stride
        self.expands, self.residual = expansion != 1, stride == 1 and width_in == width_out
        if self.expands:
            self._expand_conv = nn.Conv2d(width_in, inner, 1, bias=False)
            self._bn0 = _norm(inner)
        self._depthwise_conv = nn.Conv2d(inner, inner, kernel, stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv = nn.Conv2d(inner, width_out, 1, bias=False)
        self._bn2 = _norm(width_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(_pad(y, self.kernel, self.stride))))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


def load(directory: Path) -> EfficientNetLite0:
    """The model of a directory that holds `model.safetensors`; every weight must be there."""
    from safetensors.torch import load_file

    weights = load_file(directory / "model.safetensors")
    model = EfficientNetLite0(classes=len(weights["_fc.bias"]))
    model.load_state_dict(weights)
    return model


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


def _pad(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """TensorFlow's SAME padding: the odd pixel goes to the right and the bottom."""
    # So many pixels that each side has ceil(side / stride) windows.
    missing = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
    (height, width) = missing
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
