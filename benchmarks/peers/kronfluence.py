"""Kronfluence: identity and EK-FAC, summed over the held-out set or pair by pair."""

from __future__ import annotations

import copy
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from peers.workload import BATCH, Run, Workload, as_it_is


class Classification(Task):
    """Cross-entropy summed over the batch, as kronfluence asks for it; labels drawn from the model for the true Fisher information."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(batch[0])
        labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten() if sample else batch[1]
        return cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def _scores(work: Workload, factors: FactorArguments, scores: ScoreArguments) -> Run:
    task = Classification()
    model = prepare_model(copy.deepcopy(work.model), task)
    train, valid = work.dataset(work.train), work.dataset(work.valid)
    analyzer = Analyzer("peers", model, task, cpu=True, disable_tqdm=True, output_dir=str(work.scratch))
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=as_it_is))

    def run() -> Tensor:
        analyzer.fit_all_factors("factors", train, BATCH, factor_args=factors, overwrite_output_dir=True)
        analyzer.compute_pairwise_scores(
            "scores", "factors", valid, train, per_device_query_batch_size=BATCH, per_device_train_batch_size=BATCH,
            score_args=scores, overwrite_output_dir=True,
        )  # fmt: skip
        found = analyzer.load_pairwise_scores("scores")["all_modules"]
        return -(found[0] if scores.aggregate_query_gradients else found.T)

    return run


AGGREGATED = ScoreArguments(aggregate_query_gradients=True, damping_factor=None)
PAIRS = ScoreArguments(query_gradient_accumulation_steps=2, damping_factor=None)  # both query batches before one pass over the training set


def aggregate(work: Workload) -> Run:
    return _scores(work, FactorArguments("identity"), AGGREGATED)


def pairwise(work: Workload) -> Run:
    return _scores(work, FactorArguments("identity"), PAIRS)


def ekfac(work: Workload) -> Run:
    return _scores(work, FactorArguments("ekfac"), AGGREGATED)


def ekfac_float32(work: Workload) -> Run:
    return _scores(work, FactorArguments("ekfac", eigendecomposition_dtype=torch.float32), AGGREGATED)


def ekfac_1500(work: Workload) -> Run:
    few = FactorArguments("ekfac", eigendecomposition_dtype=torch.float32, covariance_max_examples=1500, lambda_max_examples=1500)
    return _scores(work, few, AGGREGATED)


def kfac(work: Workload) -> Run:
    return _scores(work, FactorArguments("kfac", eigendecomposition_dtype=torch.float32), AGGREGATED)


def ekfac_pairwise(work: Workload) -> Run:
    return _scores(work, FactorArguments("ekfac", eigendecomposition_dtype=torch.float32), PAIRS)


def self_influence(work: Workload) -> Run:
    task = Classification()
    analyzer = Analyzer("peers", prepare_model(copy.deepcopy(work.model), task), task, cpu=True, disable_tqdm=True, output_dir=str(work.scratch))
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=as_it_is))
    train = work.dataset(work.train)

    def run() -> Tensor:
        analyzer.fit_all_factors("factors", train, BATCH, factor_args=FactorArguments("identity"), overwrite_output_dir=True)
        analyzer.compute_self_scores("self", "factors", train, per_device_train_batch_size=BATCH, overwrite_output_dir=True)
        return analyzer.load_self_scores("self")["all_modules"]

    return run
