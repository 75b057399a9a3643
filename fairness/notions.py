"""The notions of fairness by fairlearn's names: which rate of which samples is compared between groups."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from robust_if.predictions import class_logits, log_odds
from robust_if.task import Batch, Params, Task

Statistic = Literal["selection", "error", "loss", "score", "residual", "prediction"]
Among = Literal["all", "positive", "negative"]
Method = Literal["between_groups", "to_overall"]


@dataclass(frozen=True)
class Rate:
    """The mean of a statistic among some of the samples of a group.

    Args:
        statistic: ``"selection"`` (the softly thresholded decision for the positive class), ``"error"`` (the same decision being wrong), ``"loss"``,
            ``"score"`` (log-odds of the positive class), ``"residual"`` (outcome minus prediction) or ``"prediction"`` (the output itself, of a
            regression).
        among: samples that count, by their label.
    """

    statistic: Statistic
    among: Among = "all"

    @property
    def needs_classes(self) -> bool:
        """Whether labels have to be classes; a floating-point outcome is that of a regression."""
        return self.among != "all" or self.statistic in ("selection", "error", "score")

    @property
    def is_of_one_class(self) -> bool:
        """Whether it depends on which class is the positive one."""
        return self.among != "all" or self.statistic in ("selection", "score", "residual")

    def counted(self, y: Tensor, positive: int) -> Tensor:
        """Which samples count, ``(n,)``."""
        return torch.ones_like(y, dtype=torch.bool) if self.among == "all" else (y == positive) == (self.among == "positive")

    def of(self, task: Task, params: Params, batch: Batch, positive: int, temperature: float) -> Tensor:
        """The statistic of every sample, ``(B,)``, differentiable in ``params``.

        Raises:
            ValueError: if the outputs of the model do not fit the statistic, or ``positive`` is none of its classes.
        """
        if self.statistic == "loss":
            return task.losses(params, batch)
        return self.of_outputs(task.outputs(params, batch), batch[1], positive, temperature)

    def of_outputs(self, outputs: Any, y: Tensor, positive: int, temperature: float) -> Tensor:
        """The same from what the model returned; for all statistics but the loss."""
        if self.statistic == "prediction" or (self.statistic == "residual" and y.is_floating_point()):
            predicted = _predictions(outputs)
            return predicted if self.statistic == "prediction" else y.to(predicted) - predicted
        logits = class_logits(outputs)
        largest = max(positive, int(y.max())) if self.statistic == "error" else positive
        if largest >= logits.shape[1]:
            raise ValueError(f"positive, labels: expected classes from 0 to {logits.shape[1] - 1}, which the model has, got {largest}")
        if self.statistic == "score":
            return log_odds(logits, torch.full_like(y, positive, dtype=torch.long))
        if self.statistic == "residual":
            return (y == positive).to(logits) - torch.softmax(logits, 1)[:, positive]
        decided = torch.softmax(logits / temperature, 1)
        return decided[:, positive] if self.statistic == "selection" else 1 - decided.gather(1, y.long()[:, None])[:, 0]


@dataclass(frozen=True)
class Notion:
    """What should be equal between groups.

    Args:
        words: the notion in words.
        rates: that are compared; several are aggregated. They share one statistic.
        compare: ``"difference"`` of rates; ``"covariance"`` of the rate with membership, πg (rg − r); ``"highest"``, the largest rate itself.
    """

    words: str
    rates: tuple[Rate, ...]
    compare: Literal["difference", "covariance", "highest"] = "difference"

    def comparisons(self, sizes: ArrayLike, method: Method, shrink: float = 0.0) -> tuple[list[tuple[int, int | None]], NDArray[np.float64]]:
        """The comparisons of the rates of k cells.

        Args:
            sizes: ``(k,)`` samples of the cells.
            method: whether cells are compared with each other or with the rate of all of them.
            shrink: m draws the rate of a cell of n samples to that of all, (n · own + m · all) / (n + m).

        Returns:
            Which cell is compared with which (``None``: with all of them), and the matrix ``(m, k)`` that makes the m comparisons of the k rates.
        """
        n = np.asarray(sizes, dtype=np.float64)
        share = n / n.sum()
        own = (np.diag(n) + shrink * share) / (n + shrink)[:, None]
        alone: list[tuple[int, int | None]] = [(at, None) for at in range(len(n))]
        if self.compare == "highest":
            return alone, own
        if len(n) < 2:
            return [], np.zeros((0, len(n)))
        if self.compare == "covariance":
            return alone, share[:, None] * (own - share)
        if method == "to_overall":
            return alone, own - share
        pairs = [(second, first) for first, second in combinations(range(len(n)), 2)]
        return list(pairs), np.stack([own[second] - own[first] for second, first in pairs])


_TPR, _FPR = Rate("selection", "positive"), Rate("selection", "negative")

#: The notions by name. A gap of miss rates is that of hit rates, so false negatives go with true positives.
NOTIONS = {
    "demographic_parity": Notion("share of positive predictions", (Rate("selection"),)),
    "true_positive_rate_parity": Notion("true positive rate", (_TPR,)),
    "false_positive_rate_parity": Notion("false positive rate", (_FPR,)),
    "false_negative_rate_parity": Notion("false negative rate", (_TPR,)),
    "true_negative_rate_parity": Notion("true negative rate", (_FPR,)),
    "equal_opportunity": Notion("true positive rate", (_TPR,)),
    "equalized_odds": Notion("true and false positive rate", (_TPR, _FPR)),
    "error_rate_parity": Notion("error rate", (Rate("error"),)),
    "covariance": Notion("covariance of the score with the group", (Rate("score"),), "covariance"),
    "loss_gap": Notion("loss", (Rate("loss"),)),
    "positive_loss_gap": Notion("loss of the positive samples", (Rate("loss", "positive"),)),
    "calibration_gap": Notion("outcome minus prediction", (Rate("residual"),)),
    "mean_prediction_gap": Notion("mean prediction of a regression", (Rate("prediction"),)),
    "worst_group_loss": Notion("loss of the worst group", (Rate("loss"),), "highest"),
}


def _predictions(outputs: Any) -> Tensor:
    """One number per sample, ``(B,)``, from ``(B,)`` or ``(B, 1)``."""
    if not isinstance(outputs, Tensor) or outputs.numel() != len(outputs):
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"model: expected one prediction per sample, (B,) or (B, 1), got {got}; labels of a classifier have to be whole numbers")
    return outputs.reshape(len(outputs))
