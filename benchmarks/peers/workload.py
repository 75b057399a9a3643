"""What every process is given: the same trained model, the same images, the same batches. Needs torch, numpy and safetensors alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH = 250

Batch = tuple[Tensor, Tensor]
#: A case prepares what is not timed and returns what is: scores (n,) or (n, q), positive = harmful, or None where there is nothing to compare.
Run = Callable[[], "Tensor | np.ndarray | None"]


class Rows(TensorDataset):
    """A data set that hands a whole batch over at once: peers that insist on a DataLoader shall not pay for collating single images."""

    def __getitems__(self, rows: list[int]) -> Batch:
        return self[rows]


def as_it_is(batch: Batch) -> Batch:
    return batch


def cnn() -> nn.Sequential:
    """``robust_if.models.cnn`` for 1 x 28 x 28 images and ten classes, written out: peers' environments do not hold the toolkit."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


class Workload:
    """The model and the data, read from ``folder`` (written by ``prepare.py``).

    Args:
        folder: holds ``model.safetensors`` and ``data.npz``.
        scratch: an empty folder that the case may fill.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.scratch = scratch
        self.model = cnn().eval()
        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        self._untouched = copy.deepcopy(self.model)  # peers wrap the model and hang hooks into it; the floor is measured without them
        with np.load(folder / "data.npz") as data:
            self.train, self.valid = [(torch.from_numpy(data[part + "_x"]), torch.from_numpy(data[part + "_y"])) for part in ("train", "valid")]

    def batches(self, part: Batch) -> Iterator[Batch]:
        yield from zip(part[0].split(BATCH), part[1].split(BATCH), strict=True)

    def dataset(self, part: Batch) -> Rows:
        return Rows(*part)

    def loader(self, part: Batch, batch_size: int = BATCH) -> DataLoader:
        return DataLoader(Rows(*part), batch_size, collate_fn=as_it_is)

    def forward(self) -> None:
        """The floor F: one forward pass over the training images, without gradients."""
        with torch.no_grad():
            for x, _ in self.batches(self.train):
                self._untouched(x)

    def target_gradient(self) -> dict[str, Tensor]:
        """Gradient of the mean held-out loss by parameter name, for peers that take a vector."""
        params = {name: value.detach().requires_grad_() for name, value in self._untouched.named_parameters()}
        grads = {name: torch.zeros_like(value) for name, value in params.items()}
        for x, y in self.batches(self.valid):
            loss = nn.functional.cross_entropy(torch.func.functional_call(self._untouched, params, x), y, reduction="sum") / len(self.valid[1])
            for name, grad in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
                grads[name] += grad
        return grads

    def directional(self, direction: dict[str, Tensor]) -> Tensor:
        """⟨∇ℓᵢ, v⟩ of every training sample by forward mode, ``(n,)``: for peers that give a preconditioned vector but no scores."""
        params = {name: value.detach() for name, value in self._untouched.named_parameters()}
        parts = []
        with torch.no_grad():
            for x, y in self.batches(self.train):

                def losses(p: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
                    return nn.functional.cross_entropy(torch.func.functional_call(self._untouched, p, x), y, reduction="none")

                parts.append(torch.func.jvp(losses, (params,), (direction,))[1])
        return torch.cat(parts)
