"""Per-sample gradients from layer inputs and output gradients, without a backward pass per sample.

For a linear layer the gradient of sample i is Σ_t b_it ⊗ a_it over its positions t, with a the layer's input and b the gradient at its output. One
forward and one backward pass give all a and b, and what the estimators need follows from them (``pieces.py``).

Each rule is verified on a few samples against autograd before it is used: a parameter that enters the loss in another way too (tied weights used
functionally, a custom layer) is found out, named in the log, and taken by ``vmap(grad)`` instead. Nothing is silently left out.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects
from torch.utils._pytree import tree_map

from robust_if.data import Samples, batches
from robust_if.gradients import gradient, per_sample
from robust_if.pieces import Convolved, Dense, Outer, Piece, Pieces, Rows, dense
from robust_if.task import Batch, Params, Task, batch_length

logger = logging.getLogger(__name__)

Rule = Callable[[Any, Tensor, Tensor], dict[str, Piece]]


def _linear(_: nn.Linear, a: Tensor, b: Tensor) -> dict[str, Piece]:
    return _affine(a.reshape(len(a), -1, a.shape[-1]), b.reshape(len(b), -1, b.shape[-1]))


def _conv2d(module: nn.Conv2d, a: Tensor, b: Tensor) -> dict[str, Piece]:
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return {}
    weight = Convolved(a, b, module.kernel_size, module.stride, module.padding, module.dilation)  # type: ignore[arg-type]
    return {"weight": weight, "bias": Outer(b.new_ones(()).expand(len(b), b.shape[2:].numel(), 1), weight.b)}


def _affine(a: Tensor, b: Tensor) -> dict[str, Piece]:
    """A bias is the weight of an input that is always 1."""
    return {"weight": Outer(a, b), "bias": Outer(a.new_ones(()).expand(*a.shape[:2], 1), b)}


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
    return values.reshape(len(values), -1, *module.normalized_shape).sum(1).flatten(1)


def _rms_norm(module: Any, a: Tensor, b: Tensor) -> dict[str, Piece]:
    """The scale of an RMS normalisation over the last axis; each library has a class of its own, with another name for ε."""
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None) or torch.finfo(a.dtype).eps
    bare = a * (a.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return {"weight": Dense((b * bare).reshape(len(b), -1, b.shape[-1]).sum(1))}


def _transposed(_: nn.Module, a: Tensor, b: Tensor) -> dict[str, Piece]:
    """A linear layer whose weight is ``(in, out)``, the ``Conv1D`` of GPT-2."""
    pieces = _affine(a.reshape(len(a), -1, a.shape[-1]), b.reshape(len(b), -1, b.shape[-1]))
    weight = pieces["weight"]
    assert isinstance(weight, Outer)
    return {**pieces, "weight": Outer(weight.b, weight.a)}


def _embedding(module: nn.Embedding, index: Tensor, b: Tensor) -> dict[str, Piece]:
    if module.max_norm is not None or module.scale_grad_by_freq:
        return {}
    b = b.reshape(len(b), -1, module.embedding_dim)
    index = index.reshape(len(b), -1)
    if module.padding_idx is not None:
        b = torch.where((index == module.padding_idx)[:, :, None], 0.0, b)
    return {"weight": Rows(index, b, module.num_embeddings)}


def _scaled_embedding(module: Any, index: Tensor, b: Tensor) -> dict[str, Piece]:
    """An embedding that is multiplied by a constant, as Gemma's."""
    return _embedding(module, index, b * module.embed_scale)


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


def _rule(module: nn.Module) -> Rule | None:
    """The rule of a module, by its type; of some that transformers define, by their names, since it need not be installed."""
    name = type(module).__name__
    if name.endswith("RMSNorm"):
        return _rms_norm
    if name.endswith("ScaledWordEmbedding"):
        return _scaled_embedding
    return _transposed if name == "Conv1D" else _RULES.get(type(module))


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
        # of a frozen model with an adapter the graph then begins at the adapter
        self._modules = {module: rule for (module, _), name in self._names.items() if name in params and (rule := _rule(module)) is not None}
        # two lengths: an axis of positions that comes first may be as long as one of them
        covered = set(self._verify(_head(probe, 4))) & set(self._verify(_head(probe, 3)))
        #: The parameters that no layer rule covers.
        self.uncovered = [name for name in params if name not in covered]
        if self.uncovered:
            logger.info("no layer rule for %s; their gradients are taken by vmap(grad)", some(self.uncovered))

    def with_loss(self, loss: Callable[[Any, Batch], Tensor]) -> LayerGradients:
        """The gradients of another loss of the same outputs; the rules stay verified."""
        other = copy.copy(self)
        other.task = replace(self.task, loss=loss)
        return other

    def pieces(self, batch: Batch) -> Iterator[tuple[str, list[Piece]]]:
        """For every parameter, in the order of ``params``, its name and the contributions whose sum is the per-sample gradient."""
        rules = self._by_rule(batch)
        others = per_sample(self.task, self.params, batch, self.uncovered) if self.uncovered else {}
        for name in self.params:
            yield name, [Dense(others.pop(name).flatten(1))] if name in others else [rule() for rule in rules.pop(name)]

    def dense(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """For every parameter its name and the per-sample gradients, ``(B, *shape)``."""
        for name, pieces in self.pieces(batch):
            yield name, dense(pieces).reshape(-1, *self.params[name].shape)

    def _by_rule(self, batch: Batch) -> dict[str, list[Callable[[], Piece]]]:
        """By parameter name, what makes its pieces; they are made one parameter at a time, since a convolution's patches are large."""
        with _record(self._modules, batch_length(batch)) as calls:
            losses = self.task.losses({name: value.detach().requires_grad_() for name, value in self.params.items()}, batch)
            calls = list(calls)  # gradient checkpointing calls the modules again on the way back
            edges = [call.edge for call in calls]
            grads = torch.autograd.grad(losses.sum(), edges, allow_unused=True) if edges else ()
        found: dict[str, list[Callable[[], Piece]]] = {}
        for call, b in zip(calls, grads, strict=True):
            if call.shape[0] == len(losses):
                a = call.a.to(losses.dtype) if call.a.is_floating_point() else call.a  # half precision, under autocast
                b = losses.new_zeros(call.shape) if b is None else b.to(losses.dtype)
                pieces = lru_cache(partial(self._modules[call.module], call.module, a, b))
                for local, _ in call.module.named_parameters(recurse=False):
                    if (name := self._names[call.module, local]) in self.params:
                        found.setdefault(name, []).append(lambda pieces=pieces, local=local: pieces()[local])  # type: ignore[misc]
        return found

    def _verify(self, probe: Batch) -> list[str]:
        """The parameters whose rule gives autograd's gradient on ``probe``.

        Every sample has a weight of its own: where the first axis of a layer's input is not the sample, a plain sum would still be right.
        """
        rules = self._by_rule(probe)
        weights = torch.arange(1.0, batch_length(probe) + 1, device=next(iter(self.params.values())).device)
        exact = gradient(lambda p: (losses := self.task.losses(p, probe)) @ weights.to(losses), self.params)
        largest = max(float(value.norm()) for value in exact.values())
        return [name for name, value in exact.items() if name in rules and _agrees(rules[name], weights, value, largest)]


def _agrees(rules: list[Callable[[], Piece]], weights: Tensor, exact: Tensor, largest: float) -> bool:
    """Whether the rules give ``exact``, up to rounding: also of float32 within a float64 model, and of a gradient that is nothing but rounding."""
    try:
        found = dense([rule() for rule in rules])
        got = (weights.to(found) @ found).to(exact).reshape(exact.shape)
    except KeyError:  # the rule does not serve this configuration of the layer
        return False
    tolerance = 1e-4 if exact.dtype in (torch.float32, torch.float64) else 0.1
    return bool((got - exact).norm() <= tolerance * exact.norm() + max(1e-10, 100 * torch.finfo(exact.dtype).eps) * largest)


def some(names: Sequence[str]) -> str:
    """The first few of many names, for a line in the log."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class _Call:
    """One call of a module: its input, and the shape of its output and that output's place in the graph."""

    module: nn.Module
    a: Tensor
    shape: torch.Size
    edge: GradientEdge


@contextmanager
def _record(modules: Iterable[nn.Module], samples: int) -> Iterator[list[_Call]]:
    """Collect every call of the modules.

    Positions are often embedded once for all samples. They are handed on once for each, so that their gradients come apart.
    """
    calls: list[_Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if isinstance(module, nn.Embedding) and output.ndim == 3 and output.shape[0] == 1 < samples:
            args, output = (args[0].expand(samples, -1),), output.expand(samples, -1, -1)
        if not output.requires_grad:
            output = output.requires_grad_().clone()  # the graph begins here, and may go on in place
        # the place is that of the value as it is now, whatever an in-place activation makes of the tensor later
        calls.append(_Call(module, args[0].detach(), output.shape, get_gradient_edge(output)))
        return output

    handles = [module.register_forward_hook(hook) for module in modules]
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


class Factors(Protocol):
    """The per-sample gradients of a data set at one state of the model."""

    def blocks(self) -> Iterator[tuple[slice, Pieces]]:
        """Rows of consecutive samples, from the first to the last, and their gradients."""
        ...


@dataclass(frozen=True)
class Live:
    """Gradients that are computed anew on every pass; a :class:`~robust_if.store.Store` keeps them instead."""

    gradients: LayerGradients
    samples: Samples
    batch_size: int

    @classmethod
    def of(cls, task: Task, params: Params, samples: Samples, batch_size: int) -> Live:
        """The gradients of ``task`` at ``params``; layer rules are verified on the first samples."""
        like = next(iter(params.values()))
        return cls(LayerGradients(task, params, next(batches(samples, 4, like))), samples, batch_size)

    def blocks(self) -> Iterator[tuple[slice, Pieces]]:
        start, like = 0, next(iter(self.gradients.params.values()))
        for batch in batches(self.samples, self.batch_size, like):
            rows = slice(start, start + batch_length(batch))
            yield rows, self.gradients.pieces(batch)
            start = rows.stop


def _head(batch: Batch, length: int) -> Batch:
    count = min(length, batch_length(batch))
    return tree_map(lambda leaf: leaf[:count] if isinstance(leaf, Tensor) else leaf, batch)
