"""States of a model along its training, on disk as safetensors.

Checkpoints come from strangers, so nothing here unpickles: a ``.pt`` file is refused with the way to convert it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from robust_if.task import check_state


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Parameters and buffers of a model by name, and their weight in a sum over checkpoints (TracIn: the learning rate)."""

    state: dict[str, Tensor] = field(repr=False)
    weight: float = 1.0

    @classmethod
    def of(cls, model: nn.Module, weight: float = 1.0) -> Checkpoint:
        """A copy of the model's present state, on the CPU."""
        return cls({name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}, weight)

    def save(self, path: Path) -> None:
        """Write a safetensors file; a half-written one never stands under the final name."""
        part = path.with_name(path.name + ".part")
        save_file(self.state, part, metadata={"weight": repr(self.weight)})
        os.replace(part, path)


def load_checkpoint(path: Path, model: nn.Module | None = None) -> Checkpoint:
    """Read a checkpoint, and check it against ``model`` if one is given.

    Raises:
        ValueError: if the file is no safetensors file (pickled checkpoints are refused), or does not fit the model.
        FileNotFoundError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            weight = float((file.metadata() or {}).get("weight", "1.0"))
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint: {path} is not a safetensors file ({error}). Pickled checkpoints can run code when they are opened and are not read; "
            "convert one that you trust with safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
        ) from None
    if model is not None:
        check_state(model, state)
        missing = [name for name, _ in model.named_parameters() if name not in state]
        if missing:
            raise ValueError(f"checkpoint: {path} lacks {missing[0]!r} and {len(missing) - 1} more of the model's parameters")
    if not all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point()):
        raise ValueError(f"checkpoint: {path} holds values that are not finite; the training run diverged")
    return Checkpoint(state, weight)
