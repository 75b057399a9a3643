"""Trains the model once and computes the reference scores in float64: ``python -P -m peers.prepare WORK_FOLDER`` (needs the toolkit)."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from cost import data
from safetensors.torch import load_file, save_file
from torch.func import functional_call, grad, vmap

import robust_if as rif
from peers.workload import cnn
from robust_if import models


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # sums in another order train another model
    train, valid, _ = data(5000, 500)
    task = rif.Task(models.build("cnn", (1, 28, 28), 10))
    state = rif.train(task, train, rif.Recipe(epochs=2))[-1].state
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    arrays = {f"{part}_{axis}": value.numpy() for part, samples in (("train", train), ("valid", valid))
              for axis, value in zip("xy", samples.tensors, strict=True)}  # fmt: skip
    np.savez(folder / "data.npz", **arrays)
    pairs, squares = reference(folder, arrays)
    np.savez(folder / "reference.npz", aggregate=pairs.mean(1), pairs=pairs.astype(np.float32), self=squares)


def reference(folder: Path, arrays: dict[str, np.ndarray], step: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """From float64 gradients written out in full, for training samples i and held-out samples j: −⟨∇ℓⱼ, ∇ℓᵢ⟩ / n, ``(n, q)``; ‖∇ℓᵢ‖², ``(n,)``."""
    model = cnn().double().eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    params = {name: value.detach() for name, value in model.named_parameters()}

    def loss(p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(functional_call(model, p, x[None]), y[None])

    def gradients(part: str, rows: slice) -> torch.Tensor:
        x, y = torch.from_numpy(arrays[part + "_x"][rows]).double(), torch.from_numpy(arrays[part + "_y"][rows])
        grads = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
        return torch.cat([value.flatten(1) for value in grads.values()], 1)

    n, q = len(arrays["train_y"]), len(arrays["valid_y"])
    held_out = torch.cat([gradients("valid", slice(i, i + step)) for i in range(0, q, step)])
    pairs, squares = [], []
    for i in range(0, n, step):
        grads = gradients("train", slice(i, i + step))
        pairs.append(-grads @ held_out.T / n)
        squares.append((grads**2).sum(1))
    return torch.cat(pairs).numpy(), torch.cat(squares).numpy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
