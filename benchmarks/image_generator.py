"""Which training images are behind a generated one: retrieval of its class for every estimator, and whether removing them is felt.

    python benchmarks/image_generator.py                 run what is missing, then print the tables
    python benchmarks/image_generator.py --part removal  one part
    python benchmarks/image_generator.py --data fashion  Fashion-MNIST at 14 x 14 instead of digits; it takes longer
    python benchmarks/image_generator.py --table         the tables of what has been run

A small class-conditional UNet of diffusers is trained from scratch, with a tenth of the labels left out, so that it also knows images without one.
It generates five images of each class; a classifier of real images says whether they look like it. Training images are ranked by their influence on
each generated image's denoising loss (six timesteps), and those of its class should come first. Since the model is told the class, its gradients
may tell the class whatever the image is. Hence the views:

* ``labels``: as the model was trained and as it generates.
* ``no class embedding``: the same without the gradients of the class embedding.
* ``attention``: the gradients of the attention layers alone.
* ``one timestep``: the loss at timestep 525 alone.
* ``wrong labels``: generated images are given the label of another class. Where the ranking follows it, it followed the label and not the image.
* ``no labels``: neither training images nor generated ones are given a label.

``removal``: for one generated image of a class per seed, the model is trained anew without the 5 % of the training images that are most influential
for it, without those nearest in pixels, without as many at random, and at random of its own class. What counts is how much the loss of the generated
image rises, over fresh noise at twenty timesteps; beside that without random ones, since any other model than the one that made it finds it harder.

Every result is appended to ``benchmarks/results/image_generator.jsonl`` when it is known; finished ones are not run again. Seconds are of one core,
the pass over the training images included, which the methods of a view share here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from data_sets import Splits, digits, fashion
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

import robust_if as rif
from robust_if import models
from robust_if.checkpoints import Checkpoint
from robust_if.denoising import RandomTimesteps, generate
from robust_if.evaluations.retrieval import retrieval
from robust_if.task import Batch

RESULTS = Path(__file__).parent / "results" / "image_generator.jsonl"
SEEDS, CLASSES, EACH = (0, 1, 2), 10, 5
#: The label of images without one.
NONE = CLASSES
SWEEP = rif.Sweep(batch_size=64)
SCHEDULER = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
Matrix = NDArray[Any]


@dataclass(frozen=True)
class Setting:
    """A data set with the size of its images and the length of the training; a removal is measured by shorter ones."""

    load: Callable[[int], Splits]
    side: int
    epochs: int
    shorter: int


SETTINGS = {
    "digits": Setting(lambda seed: digits(seed, (600, 100, 497)), 8, 100, 50),
    "fashion": Setting(lambda seed: fashion(seed, (600, 100, 500)), 14, 100, 50),
}


@dataclass(frozen=True)
class Generator:
    """A trained model with everything that is asked of it.

    Args:
        train, valid: real images with their classes, from −1 to 1.
        checkpoints: of the training, the last one of its end.
        task: at the end.
        images, labels: generated.
        features: ``(n, d)`` and ``(q, d)`` of training and generated images, by the classifier.
        said: of the model.
    """

    train: rif.Samples
    valid: rif.Samples
    checkpoints: list[Checkpoint]
    task: rif.Task
    images: Tensor
    labels: Tensor
    features: tuple[Matrix, Matrix]
    said: Mapping[str, Any]


def scaled(samples: rif.Samples, side: int) -> rif.Samples:
    """Images of ``side`` pixels, from −1 to 1."""
    return rif.Samples((F.adaptive_avg_pool2d(samples.batch(slice(None))[0], side) * 2 - 1, samples.labels))


def some_unlabelled(batch: Batch, generator: torch.Generator) -> Batch:
    """A tenth of the images without their label."""
    return batch[0], torch.where(torch.rand(len(batch[1]), generator=generator) < 0.1, NONE, batch[1])


def untrained(side: int, seed: int) -> rif.Task:
    """A UNet of 178,000 parameters with attention at half of the size."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = UNet2DModel(
            sample_size=side, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            attention_head_dim=16, num_class_embeds=CLASSES + 1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    return rif.Task.from_diffusers(model.eval(), SCHEDULER)


def recipe(epochs: int, seed: int) -> rif.Recipe:
    return rif.Recipe(
        optimizer="adamw", lr=4e-3, epochs=epochs, batch_size=32, augment=some_unlabelled, objective=RandomTimesteps(), keep=3, seed=seed
    )


def trained(data: str, seed: int, epochs: int) -> Generator:
    """A generator, what it generates, and how well."""
    setting = SETTINGS[data]
    train, valid, test = (scaled(each, setting.side) for each in setting.load(seed))
    began = time.process_time()
    start = untrained(setting.side, seed)
    checkpoints = rif.train(start, train, recipe(epochs, seed))
    task, seconds = start.at(checkpoints[-1].state), time.process_time() - began
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    images = generate(task.model, DDIMScheduler.from_config(SCHEDULER.config), labels, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = models.cnn((1, setting.side, setting.side), CLASSES).eval()
    classifier = rif.fit(rif.Task(network), train, rif.Recipe(epochs=20, lr=0.05, batch_size=32, seed=seed)).model
    assert isinstance(classifier, torch.nn.Sequential)
    with torch.no_grad():
        right = [float((classifier(x).argmax(1) == y).double().mean()) for x, y in (test.batch(slice(None)), (images, labels))]
        features = (classifier[:-1](train.batch(slice(None))[0]).numpy(), classifier[:-1](images).numpy())
        losses = [float(task.losses(task.params(), each.batch(slice(0, 100))).mean()) for each in (train, valid)]
    said = {"real": right[0], "generated": right[1], "train_loss": losses[0], "valid_loss": losses[1], "seconds": round(seconds, 1)}
    return Generator(train, valid, checkpoints, task, images, labels, features, said)


def other_labels(labels: Tensor) -> Tensor:
    """Those of another class."""
    return (labels + CLASSES // 2) % CLASSES


def view(name: str, made: Generator) -> tuple[rif.Task, rif.Samples, rif.Samples]:
    """The task, the training images, and the generated ones.

    The bias of a key moves no attention, so that its gradient is rounding; estimators that weigh each parameter by its own gradients would heed it.
    """
    train, labels = made.train, made.labels
    names = [each for each in made.task.params() if not each.endswith("to_k.bias")]
    if name == "no class embedding":
        names = [each for each in names if not each.startswith("class_embedding")]
    elif name == "attention":
        names = [each for each in names if "attentions" in each]
    timesteps = (525,) if name == "one timestep" else None
    task = rif.Task.from_diffusers(made.task.model, SCHEDULER, timesteps=timesteps, parameters=tuple(names))
    if name == "no labels":
        train, labels = train.with_labels(torch.full_like(train.labels, NONE)), torch.full_like(labels, NONE)
    elif name == "wrong labels":
        labels = other_labels(labels)
    return task, train, rif.Samples((made.images, labels))


FEW = ("ip", "cosine", "layer", "datainf")
#: Of every view the methods, those first that share the pass over the training images.
VIEWS: dict[str, tuple[str, ...]] = {
    "labels": (*FEW, "tracin", "vm", "fvm"), "no class embedding": FEW, "attention": FEW, "one timestep": (*FEW, "ekfac"), "wrong labels": FEW,
    "no labels": FEW, "": ("random", "pixels", "features"),
}  # fmt: skip


def matrices(name: str, made: Generator, wanted: set[str]) -> Iterator[tuple[str, Matrix, bool, float]]:
    """Every wanted method of a view: its name, the matrix, whether large values mean related, and seconds."""
    if not name:
        yield from baselines(made)
        return
    task, train, queries = view(name, made)
    if wanted & set(FEW):
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            store = rif.Store.build(task, train, folder, sweep=SWEEP)
            shared = time.process_time() - began
            plain = {"ip": "none", "cosine": "cosine", "layer": "layer", "datainf": "none"}
            for method in (each for each in FEW if each in wanted):
                inverse = rif.DataInf() if method == "datainf" else rif.Identity()
                began = time.process_time()
                found = rif.pairwise(task, train, queries, preconditioner=inverse, normalise=plain[method], sweep=SWEEP, index=store)  # type: ignore[arg-type]
                yield method, found, False, shared + time.process_time() - began
    others: dict[str, Callable[[], Matrix]] = {
        "tracin": lambda: sum(each.weight * rif.pairwise(task.at(each.state), train, queries, sweep=SWEEP) for each in made.checkpoints),
        "ekfac": lambda: rif.pairwise(task, train, queries, preconditioner=rif.EKFAC(fisher="empirical"), sweep=SWEEP),
        "vm": lambda: minima(rif.Plain()).pairs(task, train, target=rif.Utility(made.valid), queries=queries, sweep=SWEEP),
        "fvm": lambda: minima(rif.LowPass()).pairs(task, train, target=rif.Utility(made.valid), queries=queries, sweep=SWEEP),
    }
    for method in (each for each in others if each in wanted):
        began = time.process_time()
        found = others[method]()
        yield method, found, method in ("vm", "fvm"), time.process_time() - began


def minima(flatness: rif.Plain | rif.LowPass) -> rif.FlatMinima:
    """Moved to a minimum of the loss of real held-out images."""
    return rif.FlatMinima(rif.Tuning(steps=50, batch_size=50, flatness=flatness))


def baselines(made: Generator) -> Iterator[tuple[str, Matrix, bool, float]]:
    """What needs no gradient."""
    began = time.process_time()
    x = made.train.batch(slice(None))[0]
    yield "random", np.random.default_rng(0).standard_normal((len(x), len(made.images))), False, 0.0
    yield "pixels", cdist(x.flatten(1).numpy(), made.images.flatten(1).numpy()), False, time.process_time() - began
    yield "features", cdist(*made.features, "cosine"), False, time.process_time() - began


def retrieved(data: str, seed: int) -> Iterator[dict[str, Any]]:
    """All rows of a data set and seed that are missing."""
    asked = {"part": "retrieval", "data": data, "seed": seed}
    missing = {name: {each for each in wanted if not known({**asked, "view": name, "method": each})} for name, wanted in VIEWS.items()}
    if not any(missing.values()):
        return
    made = trained(data, seed, SETTINGS[data].epochs)
    model = {**asked, "view": "model", "method": "model"}
    if not known(model):
        yield {**model, **made.said}
    kinds = made.train.labels.numpy()
    for name, wanted in missing.items():
        for method, matrix, largest, seconds in matrices(name, made, wanted):
            if method in wanted:
                said = {**asked, "view": name, "method": method, "seconds": round(seconds, 1)}
                yield {**said, **quality(matrix, kinds, made.labels.numpy(), largest, name)}


def quality(matrix: Matrix, kinds: Matrix, labels: Matrix, largest: bool, name: str) -> dict[str, Any]:
    """AUC and recall of the class that was generated, and AUC of the class that the model was told where that is another."""
    found = retrieval(matrix, kinds, labels, largest=largest)
    said = {"auc": found.means[0], "auc_std": found.stds[0], "recall": found.means[1], "recall_std": found.stds[1]}
    if name == "wrong labels":
        said["auc_told"] = retrieval(matrix, kinds, other_labels(torch.from_numpy(labels)).numpy(), largest=largest).means[0]
    return said


def removed(data: str, seed: int) -> Iterator[dict[str, Any]]:
    """How the loss of one generated image changes when the model is trained without the images behind it."""
    setting, asked = SETTINGS[data], {"part": "removal", "data": data, "seed": seed}
    choices = ("cosine", "layer", "pixels", "random", "random of the class")
    missing = [each for each in choices if not known({**asked, "view": "removal", "method": each})]
    if not missing:
        return
    made, count = trained(data, seed, setting.shorter), round(0.05 * len(setting.load(seed)[0]))
    query = EACH * (3 * seed + 1) % len(made.images)
    x, y = made.images[query : query + 1], made.labels[query : query + 1]
    generator, n = np.random.default_rng(seed), len(made.train)
    before = error(made.task, (x, y))
    for method in missing:
        own = np.flatnonzero(made.train.labels.numpy() == int(y))
        if method in ("cosine", "layer"):
            order = np.argsort(rif.pairwise(made.task, made.train, (x, y), normalise=method, sweep=SWEEP)[:, 0])  # type: ignore[arg-type]
        elif method == "pixels":
            order = np.argsort(cdist(made.train.batch(slice(None))[0].flatten(1).numpy(), x.flatten(1).numpy())[:, 0])
        else:
            order = generator.permutation(n if method == "random" else own)
        weights = np.ones(n)
        weights[order[:count]] = 0
        task = rif.fit(untrained(setting.side, seed), made.train, recipe(setting.shorter, seed), weights=weights)
        same = int((weights[own] == 0).sum())
        yield {**asked, "view": "removal", "method": method, "before": before, "after": error(task, (x, y)), "removed": count, "of_the_class": same}


def error(task: rif.Task, batch: Batch) -> float:
    """The denoising loss at twenty timesteps, over ten draws of the noise."""
    found = []
    for seed in range(1000, 1010):
        asked = rif.Task.from_diffusers(task.model, SCHEDULER, timesteps=range(25, 1000, 50), seed=seed)
        with torch.no_grad():
            found.append(float(asked.losses(asked.params(), batch)[0]))
    return float(np.mean(found))


def rows() -> list[dict[str, Any]]:
    """What has been run."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def known(asked: Mapping[str, Any]) -> bool:
    return any(all(each.get(name) == value for name, value in asked.items()) for each in rows())


def tables() -> str:
    """Means over seeds, with the spread over seeds where there are several."""
    frame = pd.DataFrame(rows())
    lines = []
    for row in frame[frame["view"] == "model"].itertuples():
        lines.append(f"{row.data}, seed {row.seed}: classifier right on {row.real:.1%} of real and {row.generated:.0%} of generated images; loss "
                     f"{row.train_loss:.4f} (training) and {row.valid_loss:.4f} (held out); {row.seconds:.0f} s")  # fmt: skip
    lines += ["", "| data | view | method | seeds | AUC | recall | AUC of the label told | seconds |", "|---|---|---|---|---|---|---|---|"]
    asked = frame[(frame["part"] == "retrieval") & (frame["view"] != "model")]
    for (data, name, method), part in asked.groupby(["data", "view", "method"], sort=False):
        told = f"{part['auc_told'].mean():.3f}" if "auc_told" in part and part["auc_told"].notna().all() else ""
        lines.append(f"| {data} | {name or 'no gradient'} | {method} | {len(part)} | {spread(part['auc'])} | {spread(part['recall'])} | {told} | "
                     f"{part['seconds'].mean():.0f} |")  # fmt: skip
    part = frame[frame["part"] == "removal"]
    for data, some in part.groupby("data", sort=False):
        lines += ["", f"| {data} without | seeds | of its class | rise of the loss, % | rise − random | above random |", "|---|---|---|---|---|---|"]
        rises = (100 * (some["after"] / some["before"] - 1)).groupby([some["method"], some["seed"]], sort=False).mean()
        for method, each in some.groupby("method", sort=False):
            more = (rises[method] - rises["random"]).dropna() if "random" in rises else pd.Series(dtype=float)
            share = each["of_the_class"].sum() / each["removed"].sum()
            lines.append(f"| {method} | {len(each)} | {share:.0%} | {spread(rises[method], 1)} | {spread(more, 1)} | {int((more > 0).sum())} |")
    return "\n".join(lines)


def spread(values: pd.Series[float], digits: int = 3) -> str:
    """The mean, and the standard deviation over seeds."""
    return f"{values.mean():.{digits}f}" + (f" ± {values.std():.{digits}f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", choices=list(SETTINGS), action="append")
    parser.add_argument("--part", choices=["retrieval", "removal"], action="append")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    parts = {"retrieval": retrieved, "removal": removed}
    for data, seed, part in product(options.data or ["digits"], options.seed or SEEDS, options.part or parts) if not options.table else ():
        for found in parts[part](data, seed):
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps({name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}) + "\n")
            print(json.dumps(found), flush=True)
    print(tables())


if __name__ == "__main__":
    main()
