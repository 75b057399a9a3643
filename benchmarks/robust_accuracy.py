"""Whether a robust accuracy of ours can be believed: against torchattacks on the very same models, and on models that only look robust.

    python benchmarks/robust_accuracy.py attacks       every method on models trained with and without attacks
    python benchmarks/robust_accuracy.py planted       models with masked gradients and the like: what is claimed, and which checks object
    python benchmarks/robust_accuracy.py --table       the tables of everything that has been run

The data are scikit-learn's digits, 8 x 8 with pixels from 0 to 1: 1,257 for training, and 150 of the other 540 are attacked, within an L∞ ball. The
sampling error of an accuracy on 150 samples is about 4 points, but all methods attack the same samples of the same model, so that what differs is
strength alone. torchattacks 3.5.1 builds its AutoAttack with 10 steps; the same parts are run with 100 as well, which are the steps of the
reference. Square is left out on the side of torchattacks, whose loop over images is slow; ours is told with and without it.

Every result is appended to ``benchmarks/results/robust_accuracy.jsonl`` as soon as it is known; finished ones are not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import robust_if as rif
from robust_if.attacks.evasion import PGD, Threat
from robust_if.attacks.robust_training import PGDTraining
from robust_if.evaluations.baselines import accuracy
from robust_if.evaluations.robustness import robust_accuracy
from robust_if.models import cnn

RESULTS = Path(__file__).parent / "results" / "robust_accuracy.jsonl"
POINTS = 150
BOUNDS = (0.0, 1.0)
#: Robust accuracy that torchattacks at 100 steps and the official AutoAttack (both without Square) gave for other models trained in this way.
KNOWN = {("adversarial", 0.2): 0.413, ("adversarial", 0.25): 0.020, ("standard", 0.1): 0.630}
OURS = ("standard", "lite")


@cache
def digits() -> tuple[rif.Samples, rif.Samples]:
    """1,257 digits for training and 540 for the test."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(images / 16).float().reshape(-1, 1, 8, 8)[order], torch.from_numpy(labels)[order]
    return rif.Samples((x[:1257], y[:1257])), rif.Samples((x[1257:], y[1257:]))


@cache
def trained(name: str) -> rif.Task:
    """The network, trained as usual, or by PGD with 10 steps at a radius of 0.2."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = rif.Task(cnn((1, 8, 8), 10, width=32).eval())
    objective = PGDTraining(Threat(0.2, bounds=BOUNDS), steps=10) if name == "adversarial" else None
    return rif.fit(start, digits()[0], rif.Recipe(epochs=60, lr=2e-3, optimizer="adamw", objective=objective))


class Planted(nn.Module):
    """A trained network of which an attack sees less, or something else, than there is.

    Args:
        model: the network.
        kind: a name of :data:`KINDS`.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or what stands for them."""
        return KINDS[self.kind](self.model, x)


def shattered(model: nn.Module, x: Tensor) -> Tensor:
    """Gradients point where a wave of high frequency and of small height rises."""
    return model(x + 0.01 * torch.sin(400 * x))


def steep(model: nn.Module, x: Tensor) -> Tensor:
    """Inputs go through stairs whose edges are smooth but steep: between them the gradient is not 0, but too small to lead anywhere."""
    level = 8 * x
    return model((level.floor() + torch.sigmoid(200 * (level - level.floor() - 0.5))) / 8)


KINDS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "honest": lambda model, x: model(x),
    "logits x 1e4": lambda model, x: 1e4 * model(x),
    "logits x 1e6": lambda model, x: 1e6 * model(x),
    "probabilities": lambda model, x: model(x).softmax(1),
    "inputs rounded to 8 steps": lambda model, x: model((8 * x).round() / 8),
    "inputs on smooth stairs": steep,
    "shattered gradients": shattered,
    "noise on the inputs": lambda model, x: model(x + 0.1 * torch.randn(x.shape)),
    "noise on the logits": lambda model, x: model(x) + torch.randn(len(x), 10),
    "mean of the batch taken off": lambda model, x: model(x - 0.3 * x.mean(0)),
    "logits rounded": lambda model, x: model(x).round(),
}


def ours(task: rif.Task, eps: float, preset: str) -> dict[str, Any]:
    threat, test = Threat(eps, bounds=BOUNDS), digits()[1].take(range(POINTS))
    attack: Any = PGD(threat, steps=int(preset.removeprefix("pgd-")), loss="ce") if preset.startswith("pgd") else preset
    with TemporaryDirectory() as folder:  # where the second call finds the attacks of the first, so that the checks are timed alone
        measure = partial(robust_accuracy, task, test, threat, preset=attack, directory=Path(folder))
        begin = time.process_time()
        measure(checks=False)
        between = time.process_time()
        found = measure()
        seconds = {"cpu_seconds": between - begin, "check_cpu_seconds": time.process_time() - between}
    return {**found.record(), "robust": found.accuracy, **seconds}


def theirs(task: rif.Task, eps: float, steps: int) -> dict[str, Any]:
    """The parts of torchattacks' AutoAttack but Square, on the whole batch at once."""
    import torchattacks

    x, y = digits()[1].batch(slice(0, POINTS))
    given = {"eps": eps, "seed": 0, "steps": steps}
    parts = [
        torchattacks.APGD(task.model, loss="ce", **given),
        torchattacks.APGDT(task.model, n_classes=10, **given),
        torchattacks.FAB(task.model, multi_targeted=True, n_classes=10, **given),
    ]
    begin = time.process_time()
    with torch.random.fork_rng():
        found = torchattacks.MultiAttack(parts)(x, y)
    seconds = time.process_time() - begin
    assert (found - x).abs().max() <= eps + 1e-5
    robust = float((task.outputs(task.params(), (found, y)).argmax(1) == y).double().mean())
    return {"robust": robust, "cpu_seconds": seconds}


METHODS: dict[str, Callable[[rif.Task, float], dict[str, Any]]] = {
    "pgd-10": lambda task, eps: ours(task, eps, "pgd-10"),
    "pgd-100": lambda task, eps: ours(task, eps, "pgd-100"),
    "lite": lambda task, eps: ours(task, eps, "lite"),
    "standard": lambda task, eps: ours(task, eps, "standard"),
    "torchattacks, 10 steps": lambda task, eps: theirs(task, eps, 10),
    "torchattacks, 100 steps": lambda task, eps: theirs(task, eps, 100),
}


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def write(kind: str, **found: Any) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps({"kind": kind, **found}) + "\n")
    print(kind, {key: value for key, value in found.items() if isinstance(value, (str, float))}, flush=True)


def attacks() -> None:
    known = {(r["model"], r["eps"], r["method"]) for r in records() if r["kind"] == "attacks"}
    for name, eps in KNOWN:
        for method, run in METHODS.items():
            if (name, eps, method) not in known:
                clean = accuracy(trained(name), digits()[1])
                write("attacks", model=name, eps=eps, method=method, test_accuracy=clean, **run(trained(name), eps))


def planted(eps: float = 0.1) -> None:
    known = {(r["model"], r["method"]) for r in records() if r["kind"] == "planted"}
    for kind in KINDS:
        for method in ("pgd-10", "lite"):
            if (kind, method) not in known:
                task = rif.Task(Planted(trained("standard").model, kind).eval())
                torch.manual_seed(0)
                write("planted", model=kind, eps=eps, method=method, **ours(task, eps, method))


def table() -> str:
    """Robust accuracy in percent and seconds of one core by method; then what is claimed for the planted models and which checks object."""
    lines = []
    found = pd.DataFrame([r for r in records() if r["kind"] == "attacks"])
    if len(found):
        columns = list(KNOWN)
        heads = [f"{name}, eps {eps:g}" for name, eps in columns]
        lines += [f"| method | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for method in METHODS:
            cells = []
            for name, eps in columns:
                (row,) = found[(found["model"] == name) & (found["eps"] == eps) & (found["method"] == method)].to_dict("records") or [None]
                cells.append("" if row is None else _cell(row))
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append(f"| *others, other models* | {' | '.join(f'{100 * share:.1f}' for share in KNOWN.values())} |")
        clean = found.drop_duplicates("model").set_index("model")["test_accuracy"]
        lines += ["", "Clean accuracy on 540 test samples: " + ", ".join(f"{name} {100 * clean[name]:.1f} %" for name in clean.index), ""]
    found = pd.DataFrame([r for r in records() if r["kind"] == "planted"])
    if len(found):
        lines += ["| model, eps 0.1 | clean | PGD-10 claims | checks that object | lite claims | checks that object |", "|---" * 6 + "|"]
        for kind in KINDS:
            part = found[found["model"] == kind].set_index("method")
            cells = [f"{100 * part.loc[method, 'robust']:.1f} | {_objections(part.loc[method, 'checks'])}" for method in ("pgd-10", "lite")]
            lines.append(f"| {kind} | {100 * part.loc['lite', 'clean_accuracy']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    without = f", {100 * row['members'][-2]['accuracy']:.1f} without Square" if row["method"] in OURS else ""
    objections = _objections(row["checks"]) if isinstance(row["checks"], list) else "none"
    return f"{100 * row['robust']:.1f}{without} ({row['cpu_seconds']:.0f} s)" + (f"; {objections}" if objections != "none" else "")


def _objections(checks: list[dict[str, Any]]) -> str:
    return ", ".join(each["name"] for each in checks if each["passed"] is False) or "none"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["attacks", "planted", []], help="what to run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--table", action="store_true", help="print the tables of all results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for each in args.what:
        {"attacks": attacks, "planted": planted}[each]()
    if args.table:
        print(table())
