"""Dattri: TracIn and DataInf for the whole held-out set as one composite validation sample, and TRAK."""

from __future__ import annotations

import torch
from dattri.algorithm.influence_function import IFAttributorDataInf
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from peers.workload import Batch, Run, Workload

IMAGE = (1, 28, 28)


def _task(model: nn.Module) -> AttributionTask:
    def loss(params: dict[str, Tensor], data: Batch) -> Tensor:
        x, y = data  # one training sample, or in place of one held-out sample all of them
        return cross_entropy(functional_call(model, params, x.reshape(-1, *IMAGE)), y.reshape(-1))

    return AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())


def _composite(work: Workload) -> DataLoader:
    return work.loader((work.valid[0][None], work.valid[1][None]), 1)


def aggregate(work: Workload) -> Run:
    tracin = TracInAttributor(_task(work.model), weight_list=torch.ones(1), normalized_grad=False, device="cpu")
    tracin.projector_kwargs = None  # exact products; the default projects onto 512 dimensions anew for every batch, which is slower
    return lambda: -tracin.attribute(work.loader(work.train), _composite(work))[:, 0]


def datainf(work: Workload) -> Run:
    def run() -> Tensor:
        # all training gradients take 4 GB and their composite transformation is repeated for each of 20 batches: a fifth of them, by its own option
        attributor = IFAttributorDataInf(_task(work.model), device="cpu", regularization=0.1, fim_estimate_data_ratio=0.2)
        attributor.cache(work.loader(work.train))
        with torch.no_grad():
            return -attributor.attribute(work.loader(work.train), _composite(work))[:, 0]

    return run


def trak(work: Workload) -> Run:
    def margin(params: dict[str, Tensor], data: Batch) -> Tensor:
        p = correct(params, data)
        return torch.log(p / (1 - p))

    def correct(params: dict[str, Tensor], data: Batch) -> Tensor:
        x, y = data
        return torch.exp(-cross_entropy(functional_call(work.model, params, x[None]), y[None]))

    def run() -> Tensor:
        task = AttributionTask(loss_func=margin, model=work.model, checkpoints=work.model.state_dict())
        attributor = TRAKAttributor(task, correct_probability_func=correct, device="cpu", projector_kwargs={"proj_dim": 512})
        with torch.no_grad():
            attributor.cache(work.loader(work.train))
            return -attributor.attribute(work.loader(work.valid))

    return run
