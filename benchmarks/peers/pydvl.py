"""pyDVL: the gradient of the held-out loss handed in as a factor, and the inverse harmonic mean (its DataInf) pair by pair."""

from __future__ import annotations

import torch
from pydvl.influence.torch import InverseHarmonicMeanInfluence
from torch import Tensor
from torch.nn.functional import cross_entropy

from peers.workload import Run, Workload


def aggregate(work: Workload) -> Run:
    def run() -> Tensor:
        influence = InverseHarmonicMeanInfluence(work.model, cross_entropy, regularization=0.1).fit(work.loader(work.train))
        target = torch.cat([value.flatten() for value in work.target_gradient().values()])[None]
        return -torch.cat([influence.influences_from_factors(target, x, y)[0] for x, y in work.batches(work.train)])

    return run


def datainf_pairwise(work: Workload) -> Run:
    def run() -> Tensor:
        first = [part[:1000] for part in work.train]
        influence = InverseHarmonicMeanInfluence(work.model, cross_entropy, regularization=0.1).fit(work.loader((first[0], first[1])))
        factors = torch.cat([influence.influence_factors(x, y) for x, y in work.batches(work.valid)])
        return -torch.cat([influence.influences_from_factors(factors, x, y) for x, y in work.batches(work.train)], 1).T

    return run
