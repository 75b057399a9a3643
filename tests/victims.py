"""Small models to attack, with what is known about them."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from robust_if import Recipe, Samples, Task, fit
from robust_if.attacks.evasion import margin
from robust_if.models import cnn, logistic_regression
from robust_if.task import Batch


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(n: int, features: int, classes: int) -> tuple[Task, Batch]:
    """A linear model in float64, and inputs of which two thirds have the label that the model says."""
    with torch.random.fork_rng():
        torch.manual_seed(classes)
        task = Task(logistic_regression((features,), classes).double().eval())
    x = torch.randn(n, features, generator=seeded()).double()
    said = task.outputs(task.params(), (x,)).argmax(1)
    return task, (x, torch.where(torch.arange(n) % 3 == 2, (said + 1) % classes, said))


def breakable(task: Task, batch: Batch, low: Tensor, high: Tensor) -> Tensor:
    """Whether a linear model errs somewhere in the box, ``(B,)``: for each wrong class the best corner is known."""
    weight, bias = task.params()["1.weight"], task.params()["1.bias"]
    slope = weight - weight[batch[1]][:, None]  # (B, K, D)
    lead = torch.where(slope > 0, slope * high[:, None], slope * low[:, None]).nan_to_num().sum(2) + bias - bias[batch[1]][:, None]
    return (lead.scatter(1, batch[1][:, None], -torch.inf) > 0).any(1)


def one_and_two_logits(n: int = 20) -> tuple[Task, Task, Batch]:
    """A network with one logit, the same with two of which the first is 0, and inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 1)).double().eval()

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            z = self.body(x)
            return torch.cat([torch.zeros_like(z), z], 1)

    x = torch.randn(n, 5, generator=seeded()).double().clamp(-2.5, 2.5)
    return Task(body), Task(Two().eval()), (x, (body(x).detach()[:, 0] > 0).long())


@cache
def digits() -> tuple[Task, Batch]:
    """A small convolutional network trained on 600 digits with pixels from 0 to 1, and 60 others."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16).float().reshape(-1, 1, 8, 8), torch.from_numpy(labels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cnn((1, 8, 8), 10, width=8).eval()
    return fit(Task(model), Samples((x[:600], y[:600])), Recipe(epochs=12, lr=0.01, optimizer="adamw")), (x[600:660], y[600:660])


def broken(task: Task, points: Tensor, labels: Tensor) -> Tensor:
    """Whether the model errs, ``(B,)``."""
    return margin(task.outputs(task.params(), (points, labels)), (points, labels)).detach() > 0
