"""Per-sample gradients whose second moment is the curvature: of the loss itself, or of a pseudo-loss that samples the Gauss-Newton matrix.

The mean of g gᵀ over the gradients of the loss at the labels is the empirical Fisher matrix. The generalised Gauss-Newton matrix is the mean of
JᵀH J, with J the Jacobian of a sample's outputs and H the Hessian of its loss in these outputs; for cross-entropy it is the Fisher matrix. With
S Sᵀ = H and random signs ε the vector g = Jᵀ S ε has E[g gᵀ] = JᵀH J, so a backward pass that starts from S ε instead of the loss samples it. Signs
need only a loss, where labels drawn from the model need its distribution. On the matrices see Martens 2020 (arXiv 1412.1193).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from robust_if.gradients import hessian, reason
from robust_if.layers import LayerGradients
from robust_if.task import Batch, cross_entropy
from robust_if.token_losses import NOT_LEARNT, NextToken

Fisher = Literal["sampled", "empirical"]
Loss = Callable[[Any, Batch], Tensor]

#: Outputs of one sample, beyond which the Hessian of its loss is not formed.
MOST_OUTPUTS = 512


def check_fisher(fisher: str) -> None:
    """Raise a ``ValueError`` unless ``fisher`` is ``"sampled"`` or ``"empirical"``."""
    if fisher not in ("sampled", "empirical"):
        raise ValueError(f"fisher: expected 'sampled' or 'empirical', got {fisher!r}")


def fisher_gradients(gradients: LayerGradients, fisher: Fisher, seed: int) -> LayerGradients:
    """Gradients, for one pass over the data in order, whose second moment is the wanted matrix; of the parameters with a layer rule only.

    Without a rule a parameter's gradient is taken sample by sample, where the signs of the whole batch are out of reach.

    Args:
        fisher: ``"empirical"`` for the loss as it is, ``"sampled"`` for :class:`SampledLoss`.
        seed: of the signs; equal seeds give equal signs on every pass, whatever the batch size.
    """
    task, params = gradients.task, gradients.params
    chosen = gradients.with_loss(task.loss if fisher == "empirical" else SampledLoss(task.loss, np.random.default_rng(seed)))
    # all parameters are bound to the model, those without a rule too, but only the others are asked for
    chosen.task = replace(chosen.task, forward=lambda _, batch: task.outputs(params, batch))
    chosen.params, chosen.uncovered = {name: value for name, value in params.items() if name not in gradients.uncovered}, []
    return chosen


@dataclass(frozen=True, eq=False)
class SampledLoss:
    """A loss whose gradient at the outputs of a sample is S ε, with S Sᵀ the Hessian of the sample's ``loss`` there and ε random signs.

    Where the Hessian is not positive semi-definite, its negative eigenvalues count as 0.

    Args:
        loss: ``(outputs, batch) -> (B,)``, of outputs that are one tensor ``(B, …)``.
        draw: source of the signs; every call takes the next rows, so that samples get the same signs in batches of any size.
    """

    loss: Loss
    draw: np.random.Generator

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise ValueError(f"fisher: 'sampled' needs a model whose outputs are one tensor, got {type(outputs).__name__}; use fisher='empirical'")
        if isinstance(self.loss, NextToken):
            return self._tokens(self.loss, outputs, batch)
        rows = outputs.reshape(len(outputs), -1)
        signs = torch.from_numpy(np.where(self.draw.random(rows.shape) < 0.5, -1.0, 1.0)).to(rows)
        root = _softmax_root if self.loss is cross_entropy else self._general_root
        return (rows * root(outputs.detach(), batch, signs)).sum(1)

    def _tokens(self, loss: NextToken, logits: Tensor, batch: Batch) -> Tensor:
        """The same of a language model, whose Hessian has a block for every token that is learnt; signs are drawn for these alone."""
        learnt = batch[1][:, 1 : logits.shape[1]] != NOT_LEARNT
        rows = logits[:, :-1][learnt]
        signs = torch.from_numpy(np.where(self.draw.random(rows.shape, dtype=np.float32) < 0.5, np.float32(-1), np.float32(1))).to(rows)
        products = (rows * _softmax_root(rows.detach(), batch, signs)).sum(1)
        sums = products.new_zeros(learnt.shape).index_put((learnt,), products).sum(1)
        return sums if loss.reduction == "sum" else sums / learnt.sum(1).clamp(min=1).to(sums).sqrt()

    def _general_root(self, outputs: Tensor, batch: Batch, signs: Tensor) -> Tensor:
        """S ε with the symmetric root S, which is unique: ``(B, outputs)``."""
        if signs.shape[1] > MOST_OUTPUTS:
            raise ValueError(
                f"fisher: 'sampled' forms the Hessian of the loss in a sample's {signs.shape[1]} outputs, at most {MOST_OUTPUTS} are allowed; "
                "use fisher='empirical'"
            )

        def curvature(output: Tensor, sample: Batch) -> Tensor:
            one = tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, sample)
            return hessian(lambda at: self.loss(at["output"][None], one)[0], {"output": output})

        axes = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)
        try:
            curvatures = torch.func.vmap(curvature, in_dims=(0, axes))(outputs, batch)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            message = f"fisher: 'sampled' needs a loss that is twice differentiable under vmap ({reason(error)}); use fisher='empirical'"
            raise ValueError(message) from error
        values, vectors = torch.linalg.eigh(curvatures.to(torch.promote_types(signs.dtype, torch.float32)))
        turned = (vectors.mT @ signs.to(vectors)[:, :, None]) * values.clamp(min=0).sqrt()[:, :, None]
        rooted: Tensor = vectors @ turned
        return rooted[:, :, 0].to(signs)


def _softmax_root(outputs: Tensor, batch: Batch, signs: Tensor) -> Tensor:
    """S ε of cross-entropy, whose Hessian is diag(p) − p pᵀ, by S = diag(√p) − p √pᵀ, at no cost: ``(B, C)``."""
    p = outputs.softmax(1)
    root = p.sqrt() * signs
    return root - p * root.sum(1, keepdim=True)
