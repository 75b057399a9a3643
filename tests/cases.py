"""The tables that most tests run over: models with data, and estimators. All in float64, small enough for an oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects
from torch.utils.data import Dataset

from robust_if import (
    EKFAC,
    KFAC,
    SAM,
    Arnoldi,
    ConjugateGradient,
    DataInf,
    DiagonalFisher,
    Ensemble,
    Estimator,
    Exact,
    FlatMinima,
    Functional,
    GradNorm,
    InnerProduct,
    LiSSA,
    Loss,
    LossChange,
    Plain,
    RandomProjection,
    Samples,
    SelfInfluence,
    Target,
    Task,
    TunedLoss,
    Tuning,
    Utility,
)
from robust_if.estimators import Combined
from robust_if.models import logistic_regression, mlp
from robust_if.task import Batch, Model, Params

TRAIN, VALID, CLASSES = 13, 9, 3


class Convolutions(nn.Module):
    """Strided, dilated and grouped convolutions, batch and group normalisation, an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, (2, 3), padding=(1, 2), dilation=(1, 2), groups=2)
        self.group = nn.GroupNorm(2, 4)
        self.third = nn.Conv2d(4, 6, 2, dilation=2, padding=1)
        self.out = nn.Linear(6, CLASSES)
        self.flat = nn.BatchNorm1d(6)
        for norm in (self.norm, self.flat):
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        x = torch.tanh(self.group(self.second(x)))
        return self.out(self.flat(self.third(x).mean((2, 3))))


class Attention(nn.Module):
    """A transformer block by hand: embedding with padding, scaled dot-product attention, layer normalisation, linear layers over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8, padding_idx=0)
        self.before, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.project = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(self.before(x)).chunk(3, -1))
        x = x + self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.after(x))))
        return self.out(x.mean(1))


class Encoder(nn.Module):
    """torch's own transformer layer, which takes a fused path in evaluation mode.

    Args:
        batch_first: whether the sample is the first axis; the four tokens are as many as the samples on which layer rules are verified.
    """

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Embedding(7, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.out(self.layer(x).mean(1) if self.batch_first else self.layer(x.transpose(0, 1)).mean(0))


class PositionsFirst(nn.Module):
    """Linear layers over (position, sample, channel), with as many positions as samples on which layer rules are verified."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.out = nn.Embedding(7, 5), nn.Linear(5, 6), nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.embed(tokens).transpose(0, 1))).mean(0))


class Tied(nn.Module):
    """The embedding is also the output layer, as a module; and a layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.twice, self.out = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.twice(self.embed(tokens).mean(1)))
        return self.out(torch.tanh(self.twice(x)))[:, :CLASSES]


class Bare(nn.Module):
    """Parameters without a layer: one used alone, and a layer's weight used a second time behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5))
        self.inner, self.out = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x * self.scale))
        return self.out(hidden + F.linear(x, self.inner.weight))


class Recurrent(nn.Module):
    """A recurrent layer, which vmap cannot serve."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.out = nn.Embedding(7, 4), nn.LSTM(4, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.layer(self.embed(tokens))[0][:, -1])


class Rows(Dataset[dict[str, Tensor]]):
    """A map-style data set of dictionaries."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"features": self.x[i], "goal": self.y[i]}


def squared_error(outputs: Tensor, batch: Batch) -> Tensor:
    return ((outputs[:, 0] - batch["goal"]) ** 2).flatten()


def features(model: Model, batch: Batch) -> Tensor:
    return model(batch["features"])


@dataclass(frozen=True)
class Case:
    """A task with training and held-out samples."""

    task: Task
    train: Samples
    valid: Samples


def _table(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 5, generator=generator).double(), torch.randint(CLASSES, (n,), generator=generator)


def _images(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 9, 8, generator=generator).double(), torch.randint(CLASSES, (n,), generator=generator)


def _tokens(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randint(7, (n, 4), generator=generator), torch.randint(CLASSES, (n,), generator=generator)


_MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, torch.Generator], tuple[Tensor, Tensor]]]] = {
    "logistic": (lambda: logistic_regression((5,), CLASSES), _table),
    "mlp": (lambda: mlp((5,), CLASSES, width=7), _table),
    "cnn": (Convolutions, _images),
    "attention": (Attention, _tokens),
    "encoder": (Encoder, _tokens),
    "encoder-positions-first": (lambda: Encoder(batch_first=False), _tokens),
    "positions-first": (PositionsFirst, _tokens),
    "tied": (Tied, _tokens),
    "bare": (Bare, _table),
    "recurrent": (Recurrent, _tokens),
}

#: Names for parametrisation; "regression" has batches that are dictionaries, and another loss.
NAMES = [*_MODELS, "regression"]
CLASSIFIERS = list(_MODELS)


def case(name: str, dtype: torch.dtype = torch.float64, train: int = TRAIN, valid: int = VALID) -> Case:
    """A case by name, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        if name == "regression":
            model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype).eval()
            parts = [Samples(Rows(_table(n, generator)[0], torch.randn(n, generator=generator).double())) for n in (train, valid)]
            return Case(Task(model, squared_error, features), *parts)
        make, draw = _MODELS[name]
        model = make().to(dtype).eval()
    return Case(Task(model), *(Samples(draw(n, generator)) for n in (train, valid)))


class Gap(Functional):
    """Squared difference of the mean probability of class 0 between two groups: not a mean, and not linear in its moments.

    The group of a sample is whether the sum of its input is positive (or odd, for tokens).
    """

    @property
    def name(self) -> str:
        return "gap"

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        outputs = task.outputs(params, batch)
        rates = outputs.softmax(1)[:, 0] if outputs.shape[1] > 1 else torch.sigmoid(outputs[:, 0])
        x = batch["features"] if isinstance(batch, dict) else batch[0]
        total = x.flatten(1).sum(1)
        group = (total > 0 if x.is_floating_point() else total % 2 > 0).to(rates)
        return torch.stack([group * rates, (1 - group) * rates, group], 1)

    def reduce(self, means: Tensor) -> Tensor:
        return (means[0] / means[2] - means[1] / (1 - means[2])) ** 2


TARGETS: dict[str, Callable[[Samples, int], Target]] = {
    "utility": lambda data, size: Utility(data, batch_size=size),
    "gap": lambda data, size: Gap(data, batch_size=size),
    "combined": lambda data, size: Utility(data, batch_size=size) + 3 * Gap(data, batch_size=size) * 0.5,
}

SHORT = Tuning(steps=4, lr=0.05, batch_size=5)

#: One row per estimator; a new one brings its row.
ESTIMATORS: dict[str, Estimator] = {
    "ip": InnerProduct(),
    "ip-cosine": InnerProduct(normalise="cosine"),
    "ip-layer": InnerProduct(normalise="layer"),
    "ip-or-cosine": Combined((InnerProduct(), InnerProduct(normalise="cosine"))),
    "loss-and-ip": Combined((Loss(), InnerProduct()), how="mean"),
    "ip-ensemble": Ensemble(members=3, rate=0.4, perturbation="dropout"),
    "ip-ensemble-gaussian": Ensemble(members=3, perturbation="gaussian"),
    "grad-norm-ensemble": Ensemble(GradNorm(), members=2),
    "self-influence": SelfInfluence(),
    "grad-norm": GradNorm(),
    "loss": Loss(),
    "tuned-loss": TunedLoss(SHORT),
    "loss-change": LossChange(SHORT),
    "diagonal-fisher": InnerProduct(DiagonalFisher()),
    "diagonal-fisher-relatif": InnerProduct(DiagonalFisher(), normalise="relatif"),
    "datainf": InnerProduct(DataInf()),
    "datainf-cosine": InnerProduct(DataInf(), normalise="cosine"),
    "trak": InnerProduct(RandomProjection(size=64)),
    "kfac": InnerProduct(KFAC(fisher="empirical")),
    "ekfac": InnerProduct(EKFAC(fisher="empirical")),
    "ekfac-relatif": InnerProduct(EKFAC(fisher="empirical"), normalise="relatif"),
    "kfac-theta-relatif": InnerProduct(KFAC(fisher="empirical"), normalise="theta-relatif"),
    "arnoldi": InnerProduct(Arnoldi(rank=5, curvature="ggn")),
    "lissa": InnerProduct(LiSSA(damping=0.1, iterations=20, batch_size=13)),
    "cg": InnerProduct(ConjugateGradient(damping=0.1, iterations=20)),
    "ekfac-cg": InnerProduct(ConjugateGradient(damping=0.1, iterations=5, preconditioner=EKFAC(damping=0.1, fisher="empirical"))),
    "exact-ggn": InnerProduct(Exact("ggn", damping=0.1)),
    "fvm": FlatMinima(SHORT, damping=1e-2),
    "fvm-train": FlatMinima(Tuning(steps=3, flatness=SAM()), fisher="train", damping=1e-2),
    "vm": FlatMinima(Tuning(steps=3, flatness=Plain()), damping=1e-2),
}


def relative(got: Any, expected: Any) -> float:
    """‖got − expected‖ / ‖expected‖."""
    got, expected = (np.asarray(value, dtype=np.float64) for value in (got, expected))
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return float(np.linalg.norm(got - expected) / (np.linalg.norm(expected) or 1.0))


def blobs(n: int, seed: int, flipped: int = 0, distance: float = 2.0) -> tuple[Samples, np.ndarray]:
    """Two Gaussian classes in the plane, and the mask ``(n,)`` of the first ``flipped`` samples, whose label is wrong."""
    draw = np.random.default_rng(seed)
    y = draw.integers(2, size=n)
    x = draw.normal(size=(n, 2)) + distance * (y[:, None] - 0.5) * np.array([1, 1]) / math.sqrt(2)
    mask = np.arange(n) < flipped
    return Samples((torch.from_numpy(x), torch.from_numpy(np.where(mask, 1 - y, y)))), mask
