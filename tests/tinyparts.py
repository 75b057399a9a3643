"""Parts of suites that take milliseconds, for the tests of the engine; what they count and where they die is told by environment variables."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from robust_if.data import Samples
from robust_if.evaluations.suites.parts import Attacked, Change, Defended, Scene
from robust_if.task import Task
from robust_if.training import Recipe


def called(name: str) -> None:
    """Note the call, where somebody counts."""
    if folder := os.environ.get("TINY_CALLS"):
        with (Path(folder) / "calls").open("a") as file:
            file.write(f"{name}\n")


def blobs(*, n: int = 40, distance: float = 2.0, model: Literal["linear", "wide"] = "linear", seed: int) -> Scene:
    called(f"blobs {seed}")
    draw = torch.Generator().manual_seed(seed)

    def made(n: int) -> Samples:
        y = torch.arange(n) % 2
        return Samples((torch.randn(n, 2, generator=draw) + distance * (y[:, None] - 0.5), y))

    task = Task(nn.Sequential(nn.Linear(2, 2 if model == "linear" else 8)).eval()).reset(seed)
    return Scene(task, Recipe(epochs=2, seed=seed), made(n), made(20), made(30))


def none(scene: Scene, *, seed: int) -> Change:
    return Change(scene)


def flips(scene: Scene, *, rate: float = 0.2, seed: int) -> Change:
    called(f"flips {seed}")
    x, y = scene.train.tensors
    bad = torch.arange(len(y)) < round(rate * len(y))
    return Change(replace(scene, train=Samples((x, torch.where(bad, 1 - y, y)))), bad=bad.numpy())


def undefended(attacked: Attacked, *, seed: int) -> Defended:
    called(f"undefended {seed}")
    print("a part may print")  # noqa: T201
    return Defended(attacked.undefended(), about={"loss": float("nan"), "kind": np.int64(3), "path": Path("x")})


def noisy(attacked: Attacked, *, scale: float = 0.1, pause: float = 0.0, seed: int) -> Defended:
    """Draws from all three global generators."""
    called(f"noisy {seed}")
    time.sleep(pause)
    model = attacked.undefended().model
    with torch.no_grad():
        for value in model.parameters():
            value += scale * (torch.randn_like(value) + random.random() + float(np.random.rand()))
    return Defended(replace(attacked.scene.task, model=model))


def slow(attacked: Attacked, *, pause: float = 0.2, seed: int) -> Defended:
    time.sleep(pause)
    return Defended(attacked.scene.task)


def failing(attacked: Attacked, *, seed: int) -> Defended:
    if not os.environ.get("TINY_MENDED"):
        raise RuntimeError("it is\nbroken")
    return undefended(attacked, seed=seed)


def deadly(attacked: Attacked, *, seed: int) -> Defended:
    if seed == 1 and not os.environ.get("TINY_MENDED"):
        os.kill(os.getpid(), signal.SIGKILL)
    return noisy(attacked, seed=seed)


def leaving(attacked: Attacked, *, seed: int) -> Defended:
    sys.exit(3)


def spoiling(attacked: Attacked, *, seed: int) -> Defended:
    attacked.scene.train.tensors[0].zero_()
    return Defended(attacked.scene.task)


def wrong(attacked: Attacked, *, seed: int) -> str:
    return "a model"


def accuracy(attacked: Attacked, defended: Defended, *, shift: float = 0.0, seed: int) -> Mapping[str, float]:
    x, y = attacked.scene.test.tensors
    with torch.no_grad():
        logits = defended.task.model(x)
    return {"accuracy": float((logits.argmax(1) == y).double().mean()) - shift, "logit": float(logits.double().sum())}


def undefined(attacked: Attacked, defended: Defended, *, seed: int) -> Mapping[str, float]:
    return {"nothing": float("nan")}


def empty(attacked: Attacked, defended: Defended, *, seed: int) -> Mapping[str, float]:
    return {}


def text(attacked: Attacked, defended: Defended, *, seed: int) -> Mapping[str, str]:
    return {"accuracy": "high"}


def seedless(scene: Scene, rate: float = 0.2) -> Change:
    return Change(scene)


def needy(scene: Scene, *, rate: float, seed: int) -> Change:
    return Change(scene)


def lonely(*, seed: int) -> Change:
    raise AssertionError


NUMBER = 3
