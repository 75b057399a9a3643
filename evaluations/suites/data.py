"""The data sets of suites by name: small images that come with scikit-learn, real images, and what the neighbouring modules hold.

Images have pixels from 0 to 1, and an attacker at test time stays within. Real ones are read from the folder that ROBUST_IF_DATA names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from robust_if import models
from robust_if.attacks.evasion import Threat
from robust_if.attacks.labels import read_labels
from robust_if.data import Samples
from robust_if.evaluations.suites import published
from robust_if.evaluations.suites.files import files, folder
from robust_if.evaluations.suites.parts import Scene
from robust_if.evaluations.suites.tables import adult, bank, breast_cancer, german, two_groups
from robust_if.evaluations.suites.truth import Known
from robust_if.loading import read
from robust_if.task import Task
from robust_if.training import Recipe, fit

#: The label sets of CIFAR-10N by a short name.
HUMAN = {"aggregate": "aggre_label", "random": "random_label1", "worst": "worse_label"}


def digits(
    *, seed: int, train: int = 1200, valid: int = 200, test: int = 397, model: str = "cnn", epochs: int = 25, eps: float = 0.1,
    pretrained: bool = False,
) -> Scene:  # fmt: skip
    """scikit-learn's 8 x 8 digits, 1,797 of them, divided at random.

    Args:
        eps: L∞ radius of an attacker at test time.
        pretrained: half of the training samples, unchanged by any attack, train the model first; then the other half trains its last layer alone.
    """
    x, y = load_digits(return_X_y=True)
    if min(train, valid, test) < 1 or train + valid + test > len(y):
        raise ValueError(f"train, valid, test: expected at least 1 each and {len(y)} in all, got {train}, {valid} and {test}")
    images = (x / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    recipe = Recipe(epochs=epochs, optimizer="adamw", lr=2e-3, seed=seed)
    scene = _scene(images, y, np.arange(len(y)), (train, valid, test), models.build(model, (1, 8, 8), 10, seed), recipe, eps)
    return _last_layer(scene) if pretrained else scene


def fashion_mnist(*, seed: int, train: int = 10_000, valid: int = 500, test: int = 2000, width: int = 8, epochs: int = 8, eps: float = 0.05) -> Scene:
    """Fashion-MNIST, 28 x 28, samples drawn at random from the training file, learnt by a small convolutional network.

    Args:
        width: channels of the network's first layer.
        eps: L∞ radius of an attacker at test time.
    """
    x, y = _fashion()
    if min(train, valid, test) < 1 or train + valid + test > len(y):
        raise ValueError(f"train, valid, test: expected at least 1 each and {len(y)} in all, got {train}, {valid} and {test}")
    recipe = Recipe(epochs=epochs, optimizer="adamw", lr=2e-3, seed=seed)
    return _scene(x, y, np.arange(len(y)), (train, valid, test), _drawn("cnn", (1, 28, 28), width, seed), recipe, eps)


def cifar10(
    *, seed: int, train: int = 8000, valid: int = 500, test: int = 1400, labels: Literal["right", "aggregate", "random", "worst"] = "right",
    model: Literal["cnn", "resnet18"] = "cnn", width: int = 16, epochs: int = 12, lr: float = 2e-3, optimizer: Literal["adamw", "sgd"] = "adamw",
    eps: float = 8 / 255,
) -> Scene:  # fmt: skip
    """The first 10,000 training images of CIFAR-10, without the few that are no exact copies, divided at random.

    Args:
        labels: of the training samples: the right ones, or those that people gave (CIFAR-10N), ``"aggregate"``, ``"random"`` or ``"worst"``, of which
            about 9, 17 and 40 % are wrong. Validation and test samples always carry the right ones.
        model: ``"cnn"`` or ``"resnet18"``.
        width: channels of the network's first layer.
        optimizer: ``"adamw"`` or ``"sgd"``.
        eps: L∞ radius of an attacker at test time.
    """
    if labels not in ("right", *HUMAN):
        raise ValueError(f"labels: expected one of right, {', '.join(HUMAN)}, got {labels!r}")
    if optimizer not in ("adamw", "sgd"):
        raise ValueError(f"optimizer: expected 'adamw' or 'sgd', got {optimizer!r}")
    x, y, ids = _cifar()
    if min(train, valid, test) < 1 or train + valid + test > len(y):
        raise ValueError(f"train, valid, test: expected at least 1 each and {len(y)} in all, got {train}, {valid} and {test}")
    recipe = Recipe(epochs=epochs, optimizer=optimizer, lr=lr, seed=seed)
    scene = _scene(x, y, ids, (train, valid, test), _drawn(model, (3, 32, 32), width, seed), recipe, eps)
    if labels == "right":
        return scene
    given = read_labels(folder("cifar10n") / "cifar10n_labels.npz", HUMAN[labels])[scene.train.ids]
    return replace(scene, train=scene.train.with_labels(given), mislabelled=given != scene.right)


def _scene(
    x: NDArray[np.float32], y: NDArray[Any], ids: NDArray[Any], sizes: tuple[int, int, int], model: torch.nn.Module, recipe: Recipe, eps: float
) -> Known:  # fmt: skip
    """Images in [0, 1], divided by the recipe's seed."""
    order = np.random.default_rng(recipe.seed).permutation(len(x))[: sum(sizes)]
    rows = np.split(order, np.cumsum(sizes)[:-1])
    training, validation, judged = (Samples((torch.from_numpy(x[each]), torch.from_numpy(y[each]).long()), ids[each]) for each in rows)
    threat = Threat(eps, bounds=(0.0, 1.0)) if eps else None
    return Known(Task(model), recipe, training, validation, judged, threat=threat, right=y[rows[0]].astype(np.int64))


def _last_layer(scene: Known) -> Known:
    """The last layer of a model that half of the training samples have trained, and the other half."""
    half = len(scene.train) // 2
    own = scene.train.take(range(half))
    trained = fit(scene.task, own, replace(scene.recipe, seed=1_000_000 + scene.recipe.seed))
    last = [name for name, module in trained.model.named_modules() if isinstance(module, torch.nn.Linear)][-1]
    task = Task(trained.model, parameters=f"{last}.*").reset(scene.recipe.seed)
    return replace(scene, task=task, train=scene.train.take(range(half, len(scene.train))), right=scene.right[half:])


def _drawn(model: str, shape: tuple[int, int, int], width: int, seed: int) -> torch.nn.Module:
    """A convolutional network of that width, its parameters drawn by the seed."""
    makers: dict[str, Callable[..., torch.nn.Module]] = {"cnn": models.cnn, "resnet18": models.resnet18}
    if model not in makers:
        raise ValueError(f"model: expected one of {', '.join(makers)}, got {model!r}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return makers[model](shape, 10, width=width).eval()


@cache
def _fashion() -> tuple[NDArray[np.float32], NDArray[Any]]:
    whole = read(folder("fashion_mnist") / "train-images-idx3-ubyte.gz")
    assert isinstance(whole.features, np.ndarray)
    return whole.features, whole.labels


@cache
def _cifar() -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any]]:
    """Images, labels and the places of the images in the whole data set."""
    with np.load(folder("cifar10") / "train_00000_09999.npz", allow_pickle=False) as file:
        x = np.cumsum(np.cumsum(file["residual"], axis=2, dtype=np.uint8), axis=3, dtype=np.uint8)
        x[:, 0] += x[:, 1]
        x[:, 2] += x[:, 1]
        kept = np.flatnonzero(file["lossless"])
        return (x[kept] / 255).astype(np.float32), file["labels"][kept], file["index"][kept]


#: By name: ``(*, seed, options) -> Scene``.
DATA: Mapping[str, Callable[..., Scene]] = {
    "digits": digits,
    "two-groups": two_groups,
    "breast-cancer": breast_cancer,
    "files": files,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "adult": adult,
    "bank": bank,
    "german": german,
    **published.DATA,
}
