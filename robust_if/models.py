"""Ready models, each with random initial parameters drawn from a seed, and the user's own by ``module:function``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from robust_if.importing import imported

Factory = Callable[[Sequence[int], int], nn.Module]


def logistic_regression(shape: Sequence[int], classes: int) -> nn.Module:
    """Multinomial logistic regression on flattened inputs."""
    return nn.Sequential(nn.Flatten(), nn.Linear(_size(shape), classes))


def mlp(shape: Sequence[int], classes: int, *, width: int = 128, depth: int = 2) -> nn.Module:
    """Multilayer perceptron with ``depth`` hidden ReLU layers of ``width`` units."""
    layers: list[nn.Module] = [nn.Flatten()]
    sizes = [_size(shape), *[width] * depth]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def cnn(shape: Sequence[int], classes: int, *, width: int = 16) -> nn.Module:
    """Two convolutions with pooling and one hidden layer, for images ``(C, H, W)`` of at least 4 x 4."""
    channels, height, wide = _image(shape, 4)
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * width * (height // 4) * (wide // 4), 8 * width), nn.ReLU(), nn.Linear(8 * width, classes),
    )  # fmt: skip


class _Block(nn.Module):
    """Basic residual block of He et al. 2016 (arXiv 1512.03385)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(shape: Sequence[int], classes: int, *, width: int = 64) -> nn.Module:
    """ResNet-18 with the 3 x 3 stem used for CIFAR; ``width`` channels in the first stage, 64 in the original."""
    channels, _, _ = _image(shape, 8)
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for stage in range(4):
        for block in range(2):
            layers.append(_Block(before, width * 2**stage, 2 if stage and not block else 1))
            before = width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


MODELS: dict[str, Factory] = {"logistic-regression": logistic_regression, "mlp": mlp, "cnn": cnn, "resnet18": resnet18}


def usual(kind: str) -> str:
    """The model for data of a kind, ``"image"``, ``"table"`` or ``"text"``, where none is named."""
    return "cnn" if kind == "image" else "mlp"


def build(name: str, shape: Sequence[int], classes: int, seed: int = 0) -> nn.Module:
    """A model by name, in evaluation mode, with initial parameters drawn from ``seed``; the global random state is left as it was.

    Args:
        name: one of :data:`MODELS`, or ``module:function`` with ``function(shape, classes) -> nn.Module``; the working directory is searched too.
        shape: shape of one input, without the sample axis.
        classes: number of classes.

    Raises:
        ValueError: if the name is unknown, or does not lead to a function that returns a module.
    """
    factory = MODELS.get(name) or imported(name, "model", MODELS)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = factory(tuple(shape), classes)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: {name} returned {type(model).__name__}, expected a torch.nn.Module")
    return model.eval()


def _size(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def _image(shape: Sequence[int], least: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < least:
        raise ValueError(
            f"model: this one takes images of shape (channels, height, width), at least {least} x {least}, got inputs of shape {tuple(shape)}"
        )
    return shape[0], shape[1], shape[2]
