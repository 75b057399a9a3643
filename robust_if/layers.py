"""Per-sample gradients from layer inputs and output gradients, without a backward pass per sample.

For a linear layer the gradient of sample i is Σ_t b_it ⊗ a_it over its positions t, with a the layer's input and b the gradient at its output. One
forward and one backward pass give all a and b, and what the estimators need (norms, quadratic forms, second moments) follows from them;
for one position per sample Σ_jk g²_jk M_jk = (b²) M (a²)ᵀ holds exactly and no gradient is ever formed.

Each rule is verified on a few samples against autograd before it is used: a parameter that enters the loss in another way too (tied weights used
functionally, a custom layer) is found out, named in the log, and taken by ``vmap(grad)`` instead. Nothing is silently left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects
from torch.utils._pytree import tree_map

from robust_if.gradients import gradient, per_sample
from robust_if.task import Batch, Params, Task, batch_length

logger = logging.getLogger(__name__)

#: Numbers (not bytes) that one chunk of per-sample gradients of one parameter may hold.
CHUNK = 2**25


@dataclass(frozen=True)
class Outer:
    """Gradients Σ_t b_t ⊗ a_t of one parameter, from ``a`` of shape (B, T, in) and ``b`` of shape (B, T, out)."""

    a: Tensor
    b: Tensor

    def dense(self) -> Tensor:
        """The gradients, ``(B, out, in)``."""
        return torch.einsum("bto,bti->boi", self.b, self.a)


@dataclass(frozen=True)
class Dense:
    """Gradients of one parameter, ``(B, *shape)``."""

    grads: Tensor

    def dense(self) -> Tensor:
        return self.grads


Piece = Outer | Dense
Rule = Callable[[Any, Tensor, Tensor], dict[str, Piece]]


def _linear(_: nn.Linear, a: Tensor, b: Tensor) -> dict[str, Piece]:
    a, b = a.reshape(len(a), -1, a.shape[-1]), b.reshape(len(b), -1, b.shape[-1])
    return {"weight": Outer(a, b), "bias": Dense(b.sum(1))}


def _conv2d(module: nn.Conv2d, a: Tensor, b: Tensor) -> dict[str, Piece]:
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return {}
    patches = F.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride)
    b = b.flatten(2).mT
    return {"weight": Outer(patches.mT, b), "bias": Dense(b.sum(1))}


def _norm(module: nn.Module, a: Tensor, b: Tensor) -> dict[str, Piece]:
    if isinstance(module, nn.LayerNorm):
        bare = F.layer_norm(a, module.normalized_shape, eps=module.eps)
        return {"weight": Dense(_positions(b * bare, module)), "bias": Dense(_positions(b, module))}
    if isinstance(module, nn.GroupNorm):
        bare = F.group_norm(a, module.num_groups, eps=module.eps)
    elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        bare = F.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)
    else:
        return {}
    return {"weight": Dense((b * bare).flatten(2).sum(2) if a.ndim > 2 else b * bare), "bias": Dense(b.flatten(2).sum(2) if b.ndim > 2 else b)}


def _positions(values: Tensor, module: nn.LayerNorm) -> Tensor:
    return values.reshape(len(values), -1, *module.normalized_shape).sum(1)


def _embedding(module: nn.Embedding, index: Tensor, b: Tensor) -> dict[str, Piece]:
    if module.max_norm is not None or module.scale_grad_by_freq:
        return {}
    grads = b.new_zeros(len(b), module.num_embeddings, module.embedding_dim)
    flat = index.reshape(len(b), -1, 1).expand(-1, -1, module.embedding_dim)
    grads.scatter_add_(1, flat, b.reshape(len(b), -1, module.embedding_dim))
    if module.padding_idx is not None:
        grads[:, module.padding_idx] = 0
    return {"weight": Dense(grads)}


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.LayerNorm: _norm,
    nn.GroupNorm: _norm,
    nn.BatchNorm1d: _norm,
    nn.BatchNorm2d: _norm,
    nn.BatchNorm3d: _norm,
    nn.Embedding: _embedding,
}


class LayerGradients:
    """Per-sample gradients of ``task`` at ``params``, one parameter at a time.

    Args:
        task: the model and its loss.
        params: where the gradients are taken.
        probe: a batch on which the rules are verified; the first few samples are used.
    """

    def __init__(self, task: Task, params: Params, probe: Batch) -> None:
        self.task, self.params = task, params
        self._names = _canonical_names(task.model)
        # two lengths: an axis of positions that comes first may be as long as one of them
        covered = set(self._verify(_head(probe, 4))) & set(self._verify(_head(probe, 3)))
        self._others = [name for name in params if name not in covered]
        if self._others:
            logger.info("no layer rule for %s; their gradients are taken by vmap(grad)", ", ".join(self._others))

    def pieces(self, batch: Batch) -> Iterator[tuple[str, list[Piece]]]:
        """For every parameter, in the order of ``params``, its name and the contributions whose sum is the per-sample gradient."""
        rules = self._by_rule(batch)
        others = per_sample(self.task, self.params, batch, self._others) if self._others else {}
        for name in self.params:
            yield name, [Dense(others.pop(name))] if name in others else [rule() for rule in rules.pop(name)]

    def dense(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """For every parameter its name and the per-sample gradients, ``(B, *shape)``."""
        for name, pieces in self.pieces(batch):
            yield name, _dense(pieces).reshape(-1, *self.params[name].shape)

    def quadratic(self, batch: Batch, metric: Params | None = None) -> dict[str, Tensor]:
        """Σ_j g²_ij M_j for every sample, ``(B,)`` by parameter name; M = 1 without ``metric``."""
        return {name: _reduce(pieces, partial(_square, metric=None if metric is None else metric[name])) for name, pieces in self.pieces(batch)}

    def products_and_squares(self, batch: Batch, direction: Params) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """⟨g_i, v⟩ and ‖g_i‖² for every sample, each ``(B,)`` by parameter name, in one pass."""
        products, squares = {}, {}
        for name, pieces in self.pieces(batch):
            products[name] = _reduce(pieces, partial(_product, direction=direction[name]))
            squares[name] = _reduce(pieces, _square)
        return products, squares

    def second_moment(self, batch: Batch) -> Params:
        """Σ_i g²_i, with the shapes of the parameters."""
        return {name: _second_moment(pieces).reshape(self.params[name].shape) for name, pieces in self.pieces(batch)}

    def _by_rule(self, batch: Batch) -> dict[str, list[Callable[[], Piece]]]:
        """By parameter name, what makes its pieces; they are made one parameter at a time, since a convolution's patches are large."""
        with _record(self.task.model) as calls:
            losses = self.task.losses(self.params, batch)
            outputs = [output for _, _, output in calls]
            grads = torch.autograd.grad(losses.sum(), outputs, allow_unused=True) if outputs else ()
        found: dict[str, list[Callable[[], Piece]]] = {}
        for (module, a, output), b in zip(calls, grads, strict=True):
            if len(output) == len(losses):
                pieces = lru_cache(partial(_RULES[type(module)], module, a.detach(), torch.zeros_like(output) if b is None else b))
                for local, _ in module.named_parameters(recurse=False):
                    if (name := self._names[module, local]) in self.params:
                        found.setdefault(name, []).append(lambda pieces=pieces, local=local: pieces()[local])  # type: ignore[misc]
        return found

    def _verify(self, probe: Batch) -> list[str]:
        """The parameters whose rule gives autograd's gradient on ``probe``.

        Every sample has a weight of its own: where the first axis of a layer's input is not the sample, a plain sum would still be right.
        """
        rules = self._by_rule(probe)
        weights = torch.arange(1.0, batch_length(probe) + 1).to(next(iter(self.params.values())))
        exact = gradient(lambda p: self.task.losses(p, probe) @ weights, self.params)
        return [name for name, value in exact.items() if name in rules and _agrees(rules[name], weights, value)]


def _agrees(rules: list[Callable[[], Piece]], weights: Tensor, exact: Tensor) -> bool:
    try:
        got = torch.tensordot(weights, _dense([rule() for rule in rules]), 1).reshape(exact.shape)
    except KeyError:  # the rule does not serve this configuration of the layer
        return False
    tolerance = 1e3 * torch.finfo(exact.dtype).eps
    return bool((got - exact).norm() <= tolerance * (exact.norm() + tolerance))


@contextmanager
def _record(model: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Collect (module, input, output) of every call of a module with a rule, inside a graph that reaches the outputs but no parameter."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.requires_grad_()
        calls.append((module, args[0], output))
        return output.clone()  # an in-place activation that follows must not change the recorded tensor

    handles = [module.register_forward_hook(hook) for module in model.modules() if type(module) in _RULES]
    try:
        with torch.enable_grad():
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def _canonical_names(model: nn.Module) -> dict[tuple[nn.Module, str], str]:
    """Name of each module's own parameters in ``named_parameters()``, where tied parameters go by their first name."""
    first = {id(value): name for name, value in model.named_parameters()}
    return {(module, local): first[id(value)] for module in model.modules() for local, value in module.named_parameters(recurse=False)}


def _single(pieces: list[Piece]) -> Outer | None:
    """The only piece, if it is an outer product of one position, so that squares factorise."""
    piece = pieces[0]
    return piece if len(pieces) == 1 and isinstance(piece, Outer) and piece.a.shape[1] == 1 else None


def _dense(pieces: list[Piece]) -> Tensor:
    total = pieces[0].dense()
    for piece in pieces[1:]:
        total = total + piece.dense().reshape(total.shape)
    return total


def _square(grads: Tensor | Outer, metric: Tensor | None = None) -> Tensor:
    if isinstance(grads, Outer):
        a2, b2 = grads.a[:, 0] ** 2, grads.b[:, 0] ** 2
        return a2.sum(1) * b2.sum(1) if metric is None else ((b2 @ metric.flatten(1)) * a2).sum(1)
    squares = grads.flatten(1) ** 2
    return squares.sum(1) if metric is None else squares @ metric.flatten()


def _product(grads: Tensor | Outer, direction: Tensor) -> Tensor:
    if isinstance(grads, Outer):
        return ((grads.b[:, 0] @ direction.flatten(1)) * grads.a[:, 0]).sum(1)
    return grads.flatten(1) @ direction.flatten()


def _reduce(pieces: list[Piece], function: Callable[[Any], Tensor]) -> Tensor:
    """``function`` of the per-sample gradients, in chunks of samples that fit in memory."""
    single = _single(pieces)
    if single is not None:
        return function(single)
    return torch.cat([function(_dense(part)) for part in _chunks(pieces)])


def _second_moment(pieces: list[Piece]) -> Tensor:
    single = _single(pieces)
    if single is not None:
        return (single.b[:, 0] ** 2).mT @ single.a[:, 0] ** 2
    return torch.stack([(_dense(part) ** 2).sum(0) for part in _chunks(pieces)]).sum(0)


def _chunks(pieces: list[Piece]) -> Iterator[list[Piece]]:
    first = pieces[0]
    size = first.a.shape[2] * first.b.shape[2] if isinstance(first, Outer) else first.grads[0].numel()
    length = len(first.a) if isinstance(first, Outer) else len(first.grads)
    step = max(1, CHUNK // max(size, 1))
    for start in range(0, length, step):
        rows = slice(start, start + step)
        yield [Outer(p.a[rows], p.b[rows]) if isinstance(p, Outer) else Dense(p.grads[rows]) for p in pieces]


def _head(batch: Batch, length: int) -> Batch:
    count = min(length, batch_length(batch))
    return tree_map(lambda leaf: leaf[:count] if isinstance(leaf, Tensor) else leaf, batch)
