"""Curvature of the mean training loss as a matrix that is only ever multiplied: streamed over batches, memory of a few parameter copies.

Besides ``gradients.py`` and ``layers.py`` the only file that calls autograd. A Gauss-Newton or Fisher product Σ Jᵀ M J v is forward mode for J v and
one backward pass for Jᵀ, which share their forward pass (Pearlmutter 1994; Schraudolph 2002); a Hessian product is forward mode over a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust_if.data import Samples, batches
from robust_if.gradients import attempt, differentiable, gradient
from robust_if.task import Batch, Params, Task

Kind = Literal["ggn", "hessian", "fisher"]
Vector = NDArray[np.float64]

#: Random vectors by which the trace is estimated.
PROBES = 5
#: Parameters up to which a (p, p) matrix is formed.
LARGEST = 10_000
#: Columns of the matrix that are formed at a time.
COLUMNS = 64


@dataclass(frozen=True, eq=False)
class Curvature:
    """v -> C v, with C the curvature of the mean loss (1/n) Σ ℓᵢ at ``params``.

    Args:
        task: the model and its loss.
        params: where the curvature is taken; parameters that the loss does not depend on have none.
        data: the n samples.
        kind: ``"ggn"``, the generalised Gauss-Newton matrix (1/n) Σ Jᵢᵀ (∂²ℓᵢ/∂f²) Jᵢ with J the Jacobian of the outputs f, which is positive
            semi-definite for a convex loss and needs a model whose output is one tensor; ``"hessian"``; or ``"fisher"``, the empirical Fisher
            information (1/n) Σ gᵢ gᵢᵀ.
        batch_size: samples at a time; it never changes a product beyond rounding.

    Raises:
        ValueError: if ``kind`` is another.

    Source: Schraudolph 2002, "Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent", section 3.
    """

    task: Task
    params: Params
    data: Samples = field(repr=False)
    kind: Kind = "ggn"
    batch_size: int = 256

    def __post_init__(self) -> None:
        check(self.kind)

    @property
    def size(self) -> int:
        """Number of parameters, p."""
        return sum(value.numel() for value in self.params.values())

    def __call__(self, vector: Params) -> Params:
        """C v, with the shapes of the parameters."""
        total = {name: torch.zeros_like(value) for name, value in self.params.items()}
        for batch in batches(self.data, self.batch_size, next(iter(self.params.values()))):
            for name, part in self._product(batch, vector).items():
                total[name] += part / len(self.data)
        return total

    def flat(self, vector: Vector) -> Vector:
        """C v for ``vector (p,)``, the parameters one after another."""
        return flatten(self(unflatten(vector, self.params)))

    def dense(self) -> Tensor:
        """C as a symmetric matrix ``(p, p)`` in float64 on the CPU; the products are taken in the type of the parameters.

        Raises:
            ValueError: if there are more than 10,000 parameters.
        """
        if self.size > LARGEST:
            raise ValueError(f"curvature: a dense matrix is for up to {LARGEST:,} parameters, this task has {self.size:,}; use 'cg' or EK-FAC")
        matrix = torch.zeros(self.size, self.size, dtype=torch.float64)
        for start in range(0, self.size, COLUMNS):
            columns = unflatten(np.eye(min(COLUMNS, self.size - start), self.size, start), self.params)
            for batch in batches(self.data, self.batch_size, next(iter(self.params.values()))):
                parts = self._products(batch, columns)
                matrix[start : start + COLUMNS] += torch.cat([part.flatten(1).cpu().double() for part in parts.values()], 1)
        return (matrix + matrix.T) / (2 * len(self.data))

    def _product(self, batch: Batch, vector: Params) -> Params:
        """n_batch · C v of one batch, by forward mode, or by differentiating a backward pass where an operation has no forward-mode rule."""
        with torch.no_grad(), differentiable(self.task.model):
            product = attempt(
                lambda: self._forward(batch, vector), "forward-mode", "differentiating twice backwards instead, which takes more memory"
            )
        if product is not None:
            return product
        with torch.enable_grad(), differentiable(self.task.model):
            return self._backward(batch, vector)

    def _products(self, batch: Batch, vectors: Params) -> Params:
        """:meth:`_product` of several vectors, ``(k, *shape)`` by name."""
        forward = torch.func.vmap(lambda vector: self._forward(batch, vector))
        with torch.no_grad(), differentiable(self.task.model):
            products: Params | None = attempt(
                lambda: forward(vectors), "vmap", "taking one column of the curvature at a time instead, which is slower"
            )
        if products is not None:
            return products
        count = len(next(iter(vectors.values())))
        singles = [self._product(batch, {name: value[k] for name, value in vectors.items()}) for k in range(count)]
        return {name: torch.stack([single[name] for single in singles]) for name in vectors}

    def _loss(self, batch: Batch) -> Callable[[Params], Tensor]:
        return lambda params: self.task.losses(params, batch).sum()

    def _forward(self, batch: Batch, vector: Params) -> Params:
        if self.kind == "hessian":
            product: Params = torch.func.jvp(torch.func.grad(self._loss(batch)), (self.params,), (vector,))[1]
            return product
        function = self._inner(batch)

        def along(params: Params) -> tuple[Tensor, Tensor]:
            pair: tuple[Tensor, Tensor] = torch.func.jvp(function, (params,), (vector,))  # type: ignore[assignment]
            return pair

        value, pull, tangent = torch.func.vjp(along, self.params, has_aux=True)  # type: ignore[misc]
        if self.kind == "ggn":
            tangent = torch.func.jvp(torch.func.grad(self._outer(batch)), (value,), (tangent,))[1]
        (product,) = pull(tangent)
        return product

    def _backward(self, batch: Batch, vector: Params) -> Params:
        if self.kind == "hessian":
            return _symmetric(self._loss(batch), self.params, vector)
        function = self._inner(batch)
        leaves = {name: value.detach().requires_grad_() for name, value in self.params.items()}
        value = function(leaves)
        # (Jᵀu)·v is linear in u, and its gradient is J v
        u = torch.zeros_like(value).requires_grad_()
        grads = torch.autograd.grad(value, list(leaves.values()), u, create_graph=True, allow_unused=True)
        pairs = [(grad * vector[name]).sum() for name, grad in zip(leaves, grads, strict=True) if grad is not None]
        (tangent,) = torch.autograd.grad(torch.stack(pairs).sum(), u)
        if self.kind == "ggn":
            outer = self._outer(batch)
            tangent = _symmetric(lambda f: outer(f["f"]), {"f": value.detach()}, {"f": tangent})["f"]
        return gradient(lambda p: (function(p) * tangent).sum(), self.params)

    def _outer(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return lambda outputs: self.task.loss(outputs, batch).sum()

    def _inner(self, batch: Batch) -> Callable[[Params], Tensor]:
        """What is linearised: the losses (Fisher), or the outputs (Gauss-Newton)."""
        if self.kind == "fisher":
            return lambda params: self.task.losses(params, batch)

        def outputs(params: Params) -> Tensor:
            value = self.task.outputs(params, batch)
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"forward: the Gauss-Newton matrix needs a model whose output is one tensor, got {type(value).__name__}; "
                    "return that tensor from Task.forward, or use curvature='fisher'"
                )
            return value

        return outputs


def mean_eigenvalue(curvature: Curvature, seed: int = 0) -> float:
    """An estimate of trace(C) / p from five products with random signs.

    Source: Hutchinson 1990, "A Stochastic Estimator of the Trace of the Influence Matrix".
    """
    draw = np.random.default_rng(seed)
    probes = (draw.choice([-1.0, 1.0], size=curvature.size) for _ in range(PROBES))
    return float(np.mean([probe @ curvature.flat(probe) for probe in probes])) / curvature.size


def automatic_damping(mean: float) -> float:
    """A tenth of the mean eigenvalue of the curvature.

    Raises:
        ValueError: if that is not a positive number.
    """
    if not 0 < mean < np.inf:
        raise ValueError(f"damping: the mean eigenvalue of the curvature is {mean:.3g}, so there is no automatic damping; pass a positive number")
    return 0.1 * mean


def residual(curvature: Curvature, damping: float, solution: Vector, vector: Vector) -> float:
    """‖(C + λI) x − v‖ / ‖v‖, by one product; 0 for v = 0."""
    length = np.linalg.norm(vector)
    return float(np.linalg.norm(curvature.flat(solution) + damping * solution - vector) / length) if length else 0.0


def check(kind: str, damping: float | None = None, samples: int | None = None) -> None:
    """Raise a ``ValueError`` unless ``kind`` is a curvature, ``damping`` is ``None`` or at least 0, and ``samples`` is ``None`` or at least 1."""
    if kind not in get_args(Kind):
        raise ValueError(f"curvature: expected 'ggn', 'hessian' or 'fisher', got {kind!r}")
    if damping is not None and not 0 <= damping < np.inf:
        raise ValueError(f"damping: expected a number of at least 0, or None for a tenth of the mean eigenvalue, got {damping}")
    if samples is not None and samples < 1:
        raise ValueError(f"samples: expected at least 1, or None for all, got {samples}")


def subset(data: Samples, count: int | None, seed: int) -> Samples:
    """``count`` samples drawn without replacement, in their order; all of them if there are fewer, or ``count`` is ``None``."""
    if count is None or count >= len(data):
        return data
    return data.take(np.sort(np.random.default_rng(seed).permutation(len(data))[:count]))


def flatten(params: Params) -> Vector:
    """All parameters as one float64 vector ``(p,)``, in their order."""
    vector: Vector = torch.cat([value.detach().flatten().to("cpu", torch.float64) for value in params.values()]).numpy()
    return vector


def unflatten(vector: Vector, like: Params) -> Params:
    """The inverse of :func:`flatten`, in the shapes, types and on the devices of ``like``; rows ``(k, p)`` become ``(k, *shape)``."""
    parts = torch.split(torch.from_numpy(np.asarray(vector, dtype=np.float64)), [value.numel() for value in like.values()], -1)
    return {name: part.reshape(*part.shape[:-1], *value.shape).to(value) for part, (name, value) in zip(parts, like.items(), strict=True)}


def _symmetric(function: Callable[[Params], Tensor], point: Params, vector: Params) -> Params:
    """∇²f v by two backward passes."""

    def slope(p: Params) -> Tensor:
        grads = torch.autograd.grad(function(p), list(p.values()), create_graph=True, allow_unused=True)
        return torch.stack([(grad * vector[name]).sum() for name, grad in zip(p, grads, strict=True) if grad is not None]).sum()

    return gradient(slope, point)
