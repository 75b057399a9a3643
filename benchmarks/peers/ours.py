"""robust-if itself, in processes like those of the others. What its interface is called stands here and nowhere else."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import robust_if as rif
from peers.workload import BATCH, Batch, Run, Workload
from robust_if.gradients import channels_last


def _samples(part: Batch) -> rif.Samples:
    return rif.Samples(part)


def _utility(part: Batch) -> rif.Utility:
    return rif.Utility(_samples(part), batch_size=BATCH)


def _aggregate(work: Workload, estimator: rif.Estimator) -> Run:
    task, train = rif.Task(work.model), _samples(work.train)
    return lambda: rif.score(task, train, target=_utility(work.valid), estimator=estimator, batch_size=BATCH).values


def aggregate(work: Workload) -> Run:
    task, train, sweep = rif.Task(work.model), _samples(work.train), rif.Sweep(BATCH)
    return lambda: rif.InnerProduct().score(task, train, target=_utility(work.valid), sweep=sweep).values


def aggregate_default(work: Workload) -> Run:
    task, train = rif.Task(work.model), _samples(work.train)
    return lambda: rif.score(task, train, target=_utility(work.valid)).values


def aggregate_bf16(work: Workload) -> Run:
    task, train = rif.Task(work.model), _samples(work.train)
    return lambda: rif.score(task, train, target=_utility(work.valid), batch_size=BATCH, precision="bf16").values


def forward_channels_last(work: Workload) -> Run:
    """The floor in the memory format that our passes choose, and that any user of torch may choose."""
    task = rif.Task(work.model)
    params = channels_last(task, task.params(), next(work.batches(work.train)))

    def run() -> None:
        with torch.no_grad():
            for batch in work.batches(work.train):
                task.losses(params, batch)

    return run


def target(work: Workload) -> Run:
    """The gradient of the target, which every aggregate case contains."""
    task, asked = rif.Task(work.model), _utility(work.valid)
    params = channels_last(task, task.params(), next(work.batches(work.train)))

    def run() -> None:
        asked.gradient(task, params)

    return run


def pairwise(work: Workload) -> Run:
    task, train, valid, sweep = rif.Task(work.model), _samples(work.train), _samples(work.valid), rif.Sweep(BATCH)
    return lambda: rif.pairwise(task, train, valid, sweep=sweep)


def pairwise_default(work: Workload) -> Run:
    task, train, valid = rif.Task(work.model), _samples(work.train), _samples(work.valid)
    return lambda: rif.pairwise(task, train, valid)


def trak(work: Workload) -> Run:
    task, train, valid, sweep = rif.Task(work.model), _samples(work.train), _samples(work.valid), rif.Sweep(BATCH)
    return lambda: rif.pairwise(task, train, valid, preconditioner=rif.RandomProjection(512), sweep=sweep)


def datainf(work: Workload) -> Run:
    return _aggregate(work, rif.InnerProduct(preconditioner=rif.DataInf()))


def kfac(work: Workload) -> Run:
    return _aggregate(work, rif.InnerProduct(preconditioner=rif.KFAC(samples=None)))


def ekfac(work: Workload) -> Run:
    return _aggregate(work, rif.InnerProduct(preconditioner=rif.EKFAC(samples=None)))


def kfac_1500(work: Workload) -> Run:
    return _aggregate(work, rif.InnerProduct(preconditioner=rif.KFAC()))


def ekfac_1500(work: Workload) -> Run:
    return _aggregate(work, rif.InnerProduct(preconditioner=rif.EKFAC(samples=1500)))


def eight_targets(work: Workload) -> Run:
    """The whole held-out set and seven of its eighths; compared is the first, the whole."""
    task, train = rif.Task(work.model), _samples(work.train)
    eighths = list(zip(*(axis.chunk(8) for axis in work.valid), strict=True))[:7]
    targets = {"whole": _utility(work.valid), **{f"eighth {k}": _utility(part) for k, part in enumerate(eighths)}}
    return lambda: rif.score(task, train, target=targets, estimator=rif.InnerProduct(), batch_size=BATCH)[0].values


def self_influence(work: Workload) -> Run:
    task, train, sweep = rif.Task(work.model), _samples(work.train), rif.Sweep(BATCH)
    return lambda: rif.SelfInfluence().score(task, train, target=_utility(work.valid), sweep=sweep).values


def _build(work: Workload, batch_size: int = BATCH) -> rif.Store:
    folder = Path(tempfile.mkdtemp(dir=work.scratch)) / "store"
    return rif.Store.build(rif.Task(work.model), _samples(work.train), folder, sweep=rif.Sweep(batch_size))


def store_build(work: Workload) -> Run:
    def run() -> None:
        _build(work)

    return run


def store_build_default(work: Workload) -> Run:
    def run() -> None:
        _build(work, rif.Sweep().batch_size)

    return run


def store_target(work: Workload) -> Run:
    store, task, train = _build(work), rif.Task(work.model), _samples(work.train)
    return lambda: rif.score(task, train, target=_utility(work.valid), estimator=rif.InnerProduct(), index=store, batch_size=BATCH).values


def store_self_influence(work: Workload) -> Run:
    store, task, train = _build(work), rif.Task(work.model), _samples(work.train)
    return lambda: rif.score(task, train, target=_utility(work.valid), estimator=rif.SelfInfluence(), index=store, batch_size=BATCH).values


def plain_per_sample(work: Workload) -> Run:
    """No library: per-sample gradients by ``vmap(grad)`` of torch, then the product. What everyone would write first."""
    params = {name: value.detach() for name, value in work.model.named_parameters()}

    def loss(p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(torch.func.functional_call(work.model, p, x[None]), y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def run() -> torch.Tensor:
        target, parts = work.target_gradient(), []
        for x, y in work.batches(work.train):
            parts.append(torch.stack([value.flatten(1) @ target[name].flatten() for name, value in gradients(params, x, y).items()]).sum(0))
        return -torch.cat(parts)

    return run
