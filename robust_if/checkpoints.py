"""States of a model along its training, on disk as safetensors.

Checkpoints come from strangers, so nothing here unpickles: a ``.pt`` file is refused with the way to convert it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from robust_if.task import Task, check_state

#: Entries of a file that are not the model's: no name in a state begins with a dot, since the names of modules and parameters are not empty.
FIRST, SECOND, STEPS = ".adam.first.", ".adam.second.", ".adam.steps"


@dataclass(frozen=True, eq=False)
class Moments:
    """What Adam remembers: running means of the gradient and of its square by parameter name, and after how many steps.

    A parameter that had no gradient yet has no entry. Its moments count as 0.

    Args:
        first: m, with decay β₁; not corrected for its start at 0.
        second: s, with decay β₂; not corrected either.
        steps: t, steps taken.
    """

    first: dict[str, Tensor] = field(repr=False)
    second: dict[str, Tensor] = field(repr=False)
    steps: int

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> Moments | None:
        """A copy of an Adam or AdamW optimiser's moments, on the CPU; ``None`` for other optimisers and before the first step.

        Args:
            params: the parameters that the optimiser trains, by name.
        """
        slots = {name: optimizer.state[value] for name, value in params.items() if "exp_avg_sq" in optimizer.state.get(value, {})}
        if not slots:
            return None
        first, second = ({name: _copy(slot[key]) for name, slot in slots.items()} for key in ("exp_avg", "exp_avg_sq"))
        return cls(first, second, max(int(slot["step"]) for slot in slots.values()))


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A state of a model along its training.

    Args:
        state: parameters and buffers by name.
        weight: in a sum over checkpoints; of the reference recipe the learning rate summed over the epochs that the checkpoint stands for (TracIn).
        moments: of the optimiser at this point, if it was Adam or AdamW; needed by :class:`~robust_if.LESS`.
    """

    state: dict[str, Tensor] = field(repr=False)
    weight: float = 1.0
    moments: Moments | None = None

    @classmethod
    def of(cls, model: nn.Module, weight: float = 1.0, moments: Moments | None = None) -> Checkpoint:
        """A copy of the model's present state, on the CPU."""
        return cls({name: _copy(value) for name, value in model.state_dict().items()}, weight, moments)

    def tensors(self) -> dict[str, Tensor]:
        """State and moments under names that cannot clash, as they stand in a file."""
        if self.moments is None:
            return self.state
        first = {FIRST + name: value for name, value in self.moments.first.items()}
        second = {SECOND + name: value for name, value in self.moments.second.items()}
        return {**self.state, **first, **second, STEPS: torch.tensor(self.moments.steps)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], weight: float = 1.0) -> Checkpoint:
        """The inverse of :meth:`tensors`.

        Raises:
            ValueError: if there are moments that do not fit the state or each other, or entries that are neither.
        """
        state = {name: value for name, value in tensors.items() if not name.startswith(".")}
        first, second = ({name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)} for kind in (FIRST, SECOND))
        extra = tensors.keys() - state.keys()
        if not extra:
            return cls(state, weight)
        unknown = sorted(name for name in extra if not name.startswith((FIRST, SECOND)) and name != STEPS)
        if unknown:
            raise ValueError(f"checkpoint: it holds {unknown[0]!r}, which is neither a model's nor Adam's")
        moments = Moments(first, second, _steps(tensors.get(STEPS)))
        _check_moments(moments, state)
        return cls(state, weight, moments)

    def save(self, path: Path) -> None:
        """Write a safetensors file; a half-written one never stands under the final name."""
        part = path.with_name(path.name + ".part")
        save_file(self.tensors(), part, metadata={"weight": repr(self.weight)})
        os.replace(part, path)


def load_checkpoint(path: Path, model: nn.Module | Task | None = None) -> Checkpoint:
    """Read a checkpoint, and check it against ``model`` if one is given.

    Args:
        path: a safetensors file.
        model: the model, all of whose parameters must be there; or a task, whose own must, such as those of an adapter.

    Raises:
        ValueError: if the file is no safetensors file (pickled checkpoints are refused), its weight or moments make no sense, or it does not fit the
            model.
        FileNotFoundError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            weight = (file.metadata() or {}).get("weight", "1.0")
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint: {path} is not a safetensors file ({error}). Pickled checkpoints can run code when they are opened and are not read; "
            "convert one that you trust with safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
        ) from None
    checkpoint = Checkpoint.from_tensors(tensors, _number(weight, path))
    if model is not None:
        module, needed = (model.model, list(model.params())) if isinstance(model, Task) else (model, [name for name, _ in model.named_parameters()])
        check_state(module, checkpoint.state)
        missing = [name for name in needed if name not in checkpoint.state]
        if missing:
            raise ValueError(f"checkpoint: {path} lacks {missing[0]!r} and {len(missing) - 1} more of the model's parameters")
    if not all(torch.isfinite(value).all() for value in tensors.values() if value.is_floating_point()):
        raise ValueError(f"checkpoint: {path} holds values that are not finite; the training run diverged")
    return checkpoint


def _number(text: str, path: Path) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"checkpoint: {path} has the weight {text[:40]!r}, expected a finite number")
    return number


def _steps(value: Tensor | None) -> int:
    if value is None or value.numel() != 1 or value.is_floating_point() or value.is_complex() or int(value) < 1:
        raise ValueError(f"checkpoint: it holds Adam's moments, but {STEPS} is not a number of steps")
    return int(value)


def _check_moments(moments: Moments, state: Mapping[str, Tensor]) -> None:
    if moments.first.keys() != moments.second.keys():
        odd = sorted(moments.first.keys() ^ moments.second.keys())[0]
        raise ValueError(f"checkpoint: it holds only one of the two moments of {odd!r}")
    for name, value in [*moments.first.items(), *moments.second.items()]:
        if name not in state or value.shape != state[name].shape or not value.is_floating_point():
            shape = tuple(state[name].shape) if name in state else "none"
            raise ValueError(f"checkpoint: a moment of {name!r} has shape {tuple(value.shape)}, {value.dtype}; the parameter has shape {shape}")
    negative = [name for name, value in moments.second.items() if (value < 0).any()]
    if negative:
        raise ValueError(f"checkpoint: the second moment of {negative[0]!r} is negative")


def _copy(value: Tensor) -> Tensor:
    return value.detach().cpu().clone().contiguous()
