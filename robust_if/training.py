"""The reference recipe: (task, data, weights, seed) -> checkpoints.

Every evaluation retrains by the same recipe, so that a difference in accuracy comes from the data. The order of epoch e depends on the seed and
e alone; a run that was interrupted and resumed therefore ends in the same parameters as one that was not.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from robust_if.checkpoints import Checkpoint, Moments
from robust_if.data import Samples, as_samples, to
from robust_if.sweep import Progress, fingerprint, silent
from robust_if.task import Batch, Task, check_state

logger = logging.getLogger(__name__)

#: The state of a training run, in its directory.
_FILE = "training.safetensors"

Augment = Callable[[Batch, torch.Generator], Batch]


class Objective(Protocol):
    """What a training step lowers, in place of the task's loss on the batch as it is: adversarial training, for one."""

    def __call__(self, task: Task, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        """Losses of the samples ``(B,)``, differentiable in the parameters of ``model``, which is in training mode and comes back so.

        Args:
            task: says how a model is called and what its loss is; its own model is not the one that is trained.
            model: the model that is trained.
            batch: as the recipe has augmented it.
            generator: for all that is random.
        """


class Reweigh(Protocol):
    """Chooses the weights of samples anew while a model is trained, such as those that influence gives them at its present parameters."""

    def __call__(self, task: Task, epoch: int) -> ArrayLike | None:
        """Weights ``(n,)`` from here on, or ``None`` to leave them as they are; called before every epoch.

        Args:
            task: the model as it is now, in evaluation mode; a copy.
            epoch: counted from 0.
        """


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Args:
        epochs: passes over the samples with non-zero weight.
        lr: peak learning rate.
        optimizer: SGD with ``momentum``, or AdamW.
        weight_decay: as the optimiser defines it.
        batch_size: samples per step.
        schedule: ``"cosine"`` to zero, ``"step"`` (x 0.1 at one half and three quarters), or ``"constant"``; per epoch.
        keep: how many checkpoints are kept, evenly spaced, the last one among them. The weight of each is the learning rate summed over the epochs
            that it stands for, those since the one kept before it: the path integral of TracIn (Pruthi et al. 2020, arXiv 2002.08484, section 3) by
            its right endpoints, whatever the schedule. With a constant rate that is TracInCP's rate times the epochs in between. Checkpoints of
            AdamW also hold its moments.
        accuracy: stop at the first epoch whose running training accuracy reaches it, for example 0.99 to train until labels are memorised.
        augment: ``(batch, generator) -> batch``, applied to every training batch.
        objective: losses of a batch, in place of the task's own on the samples as they are; see :class:`Objective`.
        rho: radius of sharpness-aware minimisation: the gradient of a step is taken at θ + rho · g/‖g‖, at twice the cost; off at 0.
        seed: order of the samples, and dropout.

    Raises:
        ValueError: if a number is out of range, or ``accuracy`` is asked for under an objective of one's own.

    Source: ``rho`` is that of Foret et al. 2021 (arXiv 2010.01412), algorithm 1.
    """

    epochs: int = 20
    lr: float = 0.05
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 64
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    keep: int = 1
    accuracy: float | None = None
    augment: Augment | None = field(default=None, repr=False)
    objective: Objective | None = None
    rho: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected a positive number, got {self.lr}")
        if not self.rho >= 0:
            raise ValueError(f"rho: expected a number of at least 0, got {self.rho}")
        if self.accuracy is not None and self.objective is not None:
            raise ValueError("accuracy: under an objective of one's own no training accuracy is known; give the number of epochs")

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "step":
            return self.lr * 0.1 ** sum(epoch >= share * self.epochs for share in (0.5, 0.75))
        return self.lr * 0.5 * (1 + float(np.cos(np.pi * epoch / self.epochs)))

    def weight(self, epoch: int) -> float:
        """The weight of a checkpoint kept after ``epoch``: the learning rates of the epochs since the one kept before it, summed."""
        since = max((kept for kept in self.kept() if kept < epoch), default=-1)
        return sum(self.rate(each) for each in range(since + 1, epoch + 1))

    def kept(self) -> frozenset[int]:
        """The epochs after which a checkpoint is kept."""
        return frozenset(round((i + 1) * self.epochs / self.keep) - 1 for i in range(self.keep))


def train(
    task: Task,
    data: Samples,
    recipe: Recipe,
    *,
    weights: ArrayLike | None = None,
    reweigh: Reweigh | None = None,
    directory: Path | None = None,
    progress: Progress = silent,
) -> list[Checkpoint]:
    """Train a copy of the task's model from its present parameters, and return checkpoints, the last one last.

    The loss of a batch is the mean of wᵢ ℓᵢ, with weights scaled to a mean of 1 over the data; samples of weight 0 are left out altogether, so that
    they reach no batch statistics either.

    Args:
        task: model and loss; only the parameters that the task names are trained.
        data: training samples.
        weights: ``(n,)`` non-negative sample weights; 1 by default.
        reweigh: chooses them anew before an epoch.
        directory: where the state is saved after every epoch, so that the same call resumes there.
        progress: wraps the loop over epochs.

    Raises:
        ValueError: if the weights do not fit the data, or the loss stops being finite.
    """
    data = as_samples(data)
    w = _weights(weights, len(data))
    model = copy.deepcopy(task.model)
    trained = {name: value for name, value in model.named_parameters() if name in task.params()}
    for name, value in model.named_parameters():
        value.requires_grad_(name in trained)
    optimizer = _optimizer(recipe, list(trained.values()))
    mark = fingerprint(task.model.state_dict(), data, recipe, recipe.augment, w.tolist(), task.patterns, task.loss, reweigh) if directory else ""
    state = _Resume(directory, mark)
    checkpoints, start, w = state.load(model, optimizer, w)
    samples, shares = _weighted(data, w)
    with torch.random.fork_rng():
        for epoch in progress(range(start, recipe.epochs), "train"):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(epoch)
            chosen = None if reweigh is None else reweigh(task.at(Checkpoint.of(model).state), epoch)
            if chosen is not None:
                w = _weights(chosen, len(data))
                samples, shares = _weighted(data, w)
            accuracy = _epoch(task, model, samples, shares, recipe, epoch, optimizer)
            done = recipe.accuracy is not None and accuracy >= recipe.accuracy
            if epoch in recipe.kept() or done:
                checkpoints.append(Checkpoint.of(model, recipe.weight(epoch), Moments.of(optimizer, trained)))
            state.save(model, optimizer, epoch + 1 if not done else recipe.epochs, checkpoints, w)
            if done:
                break
    return checkpoints


def fit(
    task: Task,
    data: Samples,
    recipe: Recipe,
    *,
    weights: ArrayLike | None = None,
    reweigh: Reweigh | None = None,
    directory: Path | None = None,
    progress: Progress = silent,
) -> Task:
    """The task with the model at the end of a training run; arguments and errors are those of :func:`train`."""
    return task.at(train(task, data, recipe, weights=weights, reweigh=reweigh, directory=directory, progress=progress)[-1].state)


def last_weights(directory: Path) -> np.ndarray:
    """The weights ``(n,)`` with which the training run in ``directory`` ended, as its ``reweigh`` chose them.

    Raises:
        FileNotFoundError: if there was none.
    """
    return load_file(directory / _FILE)["weights"].numpy()


def _epoch(
    task: Task, model: nn.Module, samples: Samples, weights: Tensor, recipe: Recipe, epoch: int, optimizer: torch.optim.Optimizer
) -> float:
    """One pass over the samples in the order of this epoch; the share of samples classified as their label says, while training."""
    seed = recipe.seed * 1_000_003 + epoch
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    correct, like = 0, next(model.parameters())
    model.train()
    order = torch.randperm(len(samples), generator=generator)
    for rows in _chunks(order, recipe.batch_size):
        batch = to(samples.batch(rows), like)
        if recipe.augment is not None:
            batch = recipe.augment(batch, generator)
        outputs, loss = _slope(task, model, batch, weights[rows], recipe, generator, optimizer)
        if recipe.rho:
            with _uphill(optimizer, recipe.rho):
                _slope(task, model, batch, weights[rows], recipe, generator, optimizer)
        optimizer.step()
        if recipe.accuracy is not None:
            correct += int((outputs.argmax(1) == batch[1]).sum())
    model.eval()
    if not torch.isfinite(loss):
        raise ValueError(f"training diverged in epoch {epoch + 1}: the loss is {loss.item()}; lower the learning rate ({recipe.lr})")
    return correct / len(samples)


def _slope(
    task: Task, model: nn.Module, batch: Batch, weights: Tensor, recipe: Recipe, generator: torch.Generator, optimizer: torch.optim.Optimizer
) -> tuple[Any, Tensor]:
    """The model's outputs where the task's own loss is lowered, and the weighted mean loss of a batch, whose gradient the parameters then hold."""
    outputs = None
    if recipe.objective is None:
        outputs = task.forward(model, batch)
        losses = task.loss(outputs, batch)
    else:
        losses = recipe.objective(task, model, batch, generator)
    loss = (weights.to(losses) * losses).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return outputs, loss.detach()


@contextmanager
def _uphill(optimizer: torch.optim.Optimizer, rho: float) -> Iterator[None]:
    """With the parameters at θ + rho · g/‖g‖ while their gradients are taken."""
    params = [value for group in optimizer.param_groups for value in group["params"] if value.grad is not None]
    before = [value.detach().clone() for value in params]
    norm = torch.stack([value.grad.norm() for value in params]).norm() + 1e-12
    with torch.no_grad():
        for value in params:
            value.add_(value.grad * (rho / norm))
    yield
    with torch.no_grad():
        for value, old in zip(params, before, strict=True):
            value.copy_(old)


def _chunks(order: Tensor, size: int) -> list[Tensor]:
    """Pieces of ``size``; a single sample that is left over joins the last piece, since batch normalisation cannot train on one."""
    pieces = list(torch.split(order, size))
    if size > 1 and len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-2:] = [torch.cat(pieces[-2:])]
    return pieces


def _optimizer(recipe: Recipe, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(params, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(params, lr=recipe.lr, weight_decay=recipe.weight_decay)


def _weights(weights: ArrayLike | None, n: int) -> np.ndarray:
    w = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != (n,):
        raise ValueError(f"weights: expected one weight per sample, shape ({n},), got {w.shape}; weights come from a decision on the same data")
    if not np.isfinite(w).all() or (w < 0).any():
        raise ValueError("weights: expected finite numbers of at least 0")
    if not w.any():
        raise ValueError("weights: all are 0, so no sample is left to train on")
    return w


def _weighted(data: Samples, weights: np.ndarray) -> tuple[Samples, Tensor]:
    """The samples of non-zero weight, and their weights scaled to a mean of 1 over those."""
    kept = np.flatnonzero(weights)
    return data.take(kept), torch.from_numpy(weights[kept] / weights[kept].mean())


class _Resume:
    """The state of a training run on disk: one safetensors file after every epoch, replaced atomically."""

    def __init__(self, directory: Path | None, mark: str) -> None:
        self.path, self.mark = (directory / _FILE if directory else None), mark

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, checkpoints: list[Checkpoint], weights: np.ndarray) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"model/{name}": value for name, value in Checkpoint.of(model).state.items()}
        for i, slots in optimizer.state_dict()["state"].items():
            present = {name: torch.as_tensor(value) for name, value in slots.items() if value is not None}
            tensors |= {f"optimizer/{i}/{name}": value.detach().clone().contiguous() for name, value in present.items()}
        for i, checkpoint in enumerate(checkpoints):
            tensors |= {f"checkpoint/{i}/{checkpoint.weight!r}/{name}": value for name, value in checkpoint.tensors().items()}
        tensors |= {"epoch": torch.tensor(epoch), "weights": torch.from_numpy(weights)}
        save_file(tensors, self.path.with_suffix(".tmp"), metadata={"fingerprint": self.mark})
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, weights: np.ndarray) -> tuple[list[Checkpoint], int, np.ndarray]:
        """Restore model and optimiser in place; the checkpoints kept so far, the epoch to go on with, and the weights, ``weights`` at first."""
        if self.path is None or not self.path.is_file():
            return [], 0, weights
        with safe_open(self.path, framework="pt") as file:
            found = (file.metadata() or {}).get("fingerprint")
        if found != self.mark:
            raise ValueError(
                f"directory: {self.path} belongs to another training run (model, data, weights or recipe differ); "
                "choose another directory or delete it"
            )
        tensors = load_file(self.path)
        state = {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
        check_state(model, state)
        model.load_state_dict(state)
        slots: dict[int, dict[str, Tensor]] = {}
        kept: dict[tuple[int, float], dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "optimizer":
                i, slot = rest.split("/")
                slots.setdefault(int(i), {})[slot] = value
            elif kind == "checkpoint":
                i, weight, entry = rest.split("/", 2)
                kept.setdefault((int(i), float(weight)), {})[entry] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
        epoch = int(tensors["epoch"])
        logger.info("resuming the training after epoch %d", epoch)
        return [Checkpoint.from_tensors(kept[i, weight], weight) for i, weight in sorted(kept)], epoch, tensors["weights"].numpy()
