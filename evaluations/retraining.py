"""Training on many subsets of the data, every finished run kept: the work behind all ground truth of data attribution."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from robust_if import training
from robust_if.data import Samples, as_samples, to
from robust_if.sweep import Progress, fingerprint, silent
from robust_if.targets import Target
from robust_if.task import Task
from robust_if.training import Recipe
from robust_if.writing import write_json

#: ``(task, samples, weights, seed) -> the trained task``; the weights ``(n,)`` are 1 for samples of the subset and 0 for the others.
Fit = Callable[[Task, Samples, NDArray[np.float64], int], Task]


@dataclass(frozen=True)
class FromScratch:
    """Training by a recipe from parameters that are drawn afresh with the same seed; a bare recipe starts at the task's present ones."""

    recipe: Recipe

    def __call__(self, task: Task, samples: Samples, weights: NDArray[np.float64], seed: int) -> Task:
        return training.fit(task.reset(seed), samples, replace(self.recipe, seed=seed), weights=weights)


@dataclass(frozen=True)
class Converged:
    """The exact minimum of a convex objective, Σ wᵢ ℓᵢ / Σ wᵢ + l2/2 ‖θ‖², by L-BFGS in float64 on all samples at once.

    The effect of a single sample drowns in what is left to the minimum where training stops early; here nothing is left. The task that is returned
    stays in float64, so that the target is evaluated in it too. The penalty takes every parameter that counts, biases too. The seed is ignored.

    Args:
        l2: strength of the penalty; positive makes the minimum of a convex loss unique.
        tolerance: largest entry of the gradient at which the minimum counts as reached.
        steps: most iterations.

    Raises:
        ValueError: if a number is out of range, or on call, if the minimum is not reached.
    """

    l2: float
    tolerance: float = 1e-10
    steps: int = 5000

    def __post_init__(self) -> None:
        if not self.l2 >= 0:
            raise ValueError(f"l2: expected a number of at least 0, got {self.l2}")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance: expected a positive number, got {self.tolerance}")

    def __call__(self, task: Task, samples: Samples, weights: NDArray[np.float64], seed: int) -> Task:
        task = replace(task, model=copy.deepcopy(task.model).double().requires_grad_(False))
        params = {name: value.clone().requires_grad_() for name, value in task.params().items()}
        leaves = list(params.values())
        kept = np.flatnonzero(weights)
        batch = to(samples.take(kept).batch(slice(None)), leaves[0])
        w = torch.from_numpy(weights[kept] / weights.sum()).to(leaves[0])
        optimizer = torch.optim.LBFGS(
            leaves, max_iter=self.steps, max_eval=2 * self.steps, history_size=100, line_search_fn="strong_wolfe",
            tolerance_grad=max(self.tolerance, 1e-6), tolerance_change=0,
        )  # fmt: skip

        def objective() -> torch.Tensor:
            penalty = torch.stack([(value * value).sum() for value in leaves]).sum()
            value: torch.Tensor = w @ task.losses(params, batch) + self.l2 / 2 * penalty
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(objective)  # type: ignore[no-untyped-call]
        # a line search compares losses, which are equal to rounding this near to the minimum; full quasi-Newton steps need gradients only
        optimizer.param_groups[0].update(line_search_fn=None, tolerance_grad=self.tolerance)
        optimizer.step(objective)  # type: ignore[no-untyped-call]
        objective()
        left = max(float(value.grad.abs().max()) for value in leaves if value.grad is not None)
        if not left <= self.tolerance:
            raise ValueError(
                f"the minimum was not reached: a gradient of {left:.1e} is left after at most {self.steps} steps, expected {self.tolerance:.1e}; "
                f"raise l2 ({self.l2:g}), steps or tolerance, or take a model with a convex loss"
            )
        return task.at({name: value.detach() for name, value in params.items()})


def half_subsets(n: int, m: int, seed: int, fraction: float = 0.5) -> NDArray[np.bool_]:
    """``m`` random subsets of ``n`` samples, ``(m, n)``, each with round(``fraction`` · n) members, drawn without replacement."""
    size = round(fraction * n)
    if not 0 < size < n:
        raise ValueError(f"fraction: expected a share that keeps at least one and not all of {n} samples, got {fraction}")
    if m < 1:
        raise ValueError(f"m: expected at least one subset, got {m}")
    return np.random.default_rng(seed).permuted(np.tile(np.arange(n) < size, (m, 1)), axis=1)


def retrain(
    task: Task,
    train: Samples,
    targets: Target | Sequence[Target],
    recipe: Recipe | Fit,
    subsets: ArrayLike,
    *,
    seeds: Sequence[int] = (0,),
    directory: Path | None = None,
    progress: Progress = silent,
) -> NDArray[np.float64]:
    """Every target at models trained on every subset with every seed.

    Args:
        task: where training starts: an untrained model, or a trained one for warm starts.
        train: the ``n`` training samples.
        targets: one or ``t`` of them, all evaluated at each model.
        recipe: how to train; or a function of one's own, :class:`FromScratch` or :class:`Converged`.
        subsets: ``(m, n)`` boolean, true for the samples that are trained on.
        seeds: ``s`` seeds of training, the same for every subset.
        directory: where every finished training is kept as one small file, so that it is never repeated; further subsets and seeds of the same task,
            data, targets and recipe may share it. A function of one's own is recognised by its name, a frozen dataclass by its fields.
        progress: wraps the loop over the trainings that are left.

    Returns:
        ``(m, s, t)`` values, in the targets' units.

    Raises:
        ValueError: if subsets or seeds are malformed, ``directory`` holds another computation, or a target is not finite.
    """
    train, targets = as_samples(train), [targets] if isinstance(targets, Target) else list(targets)
    chosen = np.asarray(subsets)
    if chosen.dtype != bool or chosen.ndim != 2 or chosen.shape[1] != len(train):
        raise ValueError(f"subsets: expected booleans of shape (m, {len(train)}), got {chosen.dtype} of shape {chosen.shape}")
    if not len(chosen) or not chosen.any(1).all():
        raise ValueError("subsets: expected at least one, and a sample in each")
    if not targets or len(set(seeds)) != len(seeds) or not len(seeds):
        raise ValueError(f"targets and seeds: expected at least one of each, and no seed twice, got {len(targets)} targets and seeds {tuple(seeds)}")
    rows = _Rows(directory, _mark(task, train, targets, recipe) if directory else "")
    names = [[_row_name(subset, seed) for seed in seeds] for subset in chosen]
    wanted = {names[k][s]: (k, seed) for k in range(len(chosen)) for s, seed in enumerate(seeds)}
    known = {name: values for name in wanted if (values := rows.load(name)) is not None}
    for name in progress([name for name in wanted if name not in known], "retrain"):
        k, seed = wanted[name]
        weights = chosen[k].astype(np.float64)
        if isinstance(recipe, Recipe):
            fitted = training.fit(task, train, replace(recipe, seed=seed), weights=weights)
        else:
            fitted = recipe(task, train, weights, seed)
        with torch.no_grad():
            values = [float(target.value(fitted, fitted.params())) for target in targets]
        if not np.isfinite(values).all():
            raise ValueError(f"subsets: the model trained on subset {k} with seed {seed} has targets that are not finite: {values}")
        known[name] = values
        rows.save(name, values)
    return np.array([[known[name] for name in row] for row in names], dtype=np.float64)


def _mark(task: Task, train: Samples, targets: Sequence[Target], recipe: Recipe | Fit) -> str:
    used = recipe if isinstance(recipe, Recipe) else getattr(recipe, "recipe", None)
    settings = [task.patterns, task.loss, task.forward, recipe, getattr(used, "augment", None), *targets]
    for setting in settings:
        if not hasattr(setting, "__qualname__") and " at 0x" in repr(setting):
            raise ValueError(f"directory: {setting!r} cannot be recognised in another process; expected a named function or a frozen dataclass")
    data = [fingerprint({}, samples) for target in targets for samples in target.held_out]
    return fingerprint(task.model.state_dict(), train, *settings, data)


def _row_name(subset: NDArray[np.bool_], seed: int) -> str:
    return f"{hashlib.sha256(np.packbits(subset).tobytes()).hexdigest()[:32]}-{seed}"


class _Rows:
    """Finished trainings on disk: one file each, named by subset and seed, written atomically beside a manifest."""

    def __init__(self, directory: Path | None, mark: str) -> None:
        self.directory = directory
        if directory is None:
            return
        manifest = directory / "manifest.json"
        if manifest.is_file() and json.loads(manifest.read_text()) != {"fingerprint": mark}:
            raise ValueError(
                f"directory: {directory} holds another computation (model, data, targets or recipe differ); choose another directory or delete it"
            )
        directory.mkdir(parents=True, exist_ok=True)
        write_json(manifest, {"fingerprint": mark})

    def load(self, name: str) -> list[float] | None:
        path = self.directory / f"{name}.json" if self.directory else None
        return list(json.loads(path.read_text())) if path is not None and path.is_file() else None

    def save(self, name: str, values: list[float]) -> None:
        if self.directory is not None:
            write_json(self.directory / f"{name}.json", values)
