"""How well pairwise scores find, for every query, the training samples of its own kind."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata


@dataclass(frozen=True, eq=False)
class Retrieval:
    """How the samples of a query's kind stand in its ranking.

    Args:
        auc: ``(q,)``, the probability that a sample of the query's kind is ranked before one of another kind; equal scores count half.
        recall: ``(q,)``, the share of the k samples of its kind that are among the first k; equal scores across that border count by their share.
    """

    auc: NDArray[np.float64] = field(repr=False)
    recall: NDArray[np.float64] = field(repr=False)

    @property
    def means(self) -> tuple[float, float]:
        """AUC and recall, averaged over the queries."""
        return float(self.auc.mean()), float(self.recall.mean())

    @property
    def stds(self) -> tuple[float, float]:
        """The standard deviations of AUC and recall over the queries."""
        return float(self.auc.std()), float(self.recall.std())

    def __str__(self) -> str:
        (auc, recall), (auc_std, recall_std) = self.means, self.stds
        return f"AUC {auc:.3f} ± {auc_std:.3f}, recall {recall:.3f} ± {recall_std:.3f}"


def retrieval(matrix: ArrayLike, train_kinds: ArrayLike, query_kinds: ArrayLike, *, largest: bool = False) -> Retrieval:
    """The retrieval of same-kind training samples by pairwise scores.

    Args:
        matrix: ``(n, q)``, a score of every training sample for every query, as :func:`robust_if.pairwise` gives them.
        train_kinds: ``(n,)``, numbers or names.
        query_kinds: ``(q,)``, of the same sort.
        largest: whether large scores mean related, as of :meth:`robust_if.FlatMinima.pairs`, whose products are squared, or of similarities. By
            default the most negative ones do: without the sample, the loss of the query would be higher.

    Raises:
        ValueError: if the shapes do not fit each other, a score is not finite, or a query's kind has no training sample or all of them.

    Source: the protocol of Kwon et al. 2024 (arXiv 2310.00902), section 4.3.
    """
    scores, rows, columns = np.asarray(matrix, dtype=np.float64), np.asarray(train_kinds), np.asarray(query_kinds)
    if rows.ndim != 1 or columns.ndim != 1:
        raise ValueError(f"train_kinds, query_kinds: expected one kind per sample, got the shapes {rows.shape} and {columns.shape}")
    if scores.shape != (len(rows), len(columns)):
        raise ValueError(f"matrix: expected the shape ({len(rows)}, {len(columns)}) of train_kinds and query_kinds, got {scores.shape}")
    if scores.size == 0:
        raise ValueError("matrix: expected at least one training sample and one query, got none")
    if not np.isfinite(scores).all():
        raise ValueError(f"matrix: {int((~np.isfinite(scores)).sum())} of {scores.size} scores are not finite")
    same = rows[:, None] == columns
    counts = same.sum(0)
    for wrong, what in ((counts == 0, "has no training sample"), (counts == len(rows), "is the kind of all training samples")):
        if wrong.any():
            raise ValueError(f"query_kinds: {columns[wrong][0]!r} {what}, so that nothing can be told apart")
    gains = scores if largest else -scores
    ranks = rankdata(gains, axis=0)
    auc = ((ranks * same).sum(0) - counts * (counts + 1) / 2) / (counts * (len(rows) - counts))
    border = np.take_along_axis(np.sort(gains, axis=0), (len(rows) - counts)[None], 0)  # the k-th largest
    above, tied = gains > border, gains == border
    room = (counts - above.sum(0)) / tied.sum(0)
    return Retrieval(auc, ((above & same).sum(0) + room * (tied & same).sum(0)) / counts)
