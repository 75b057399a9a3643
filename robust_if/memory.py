"""What a pass over the data takes in memory, measured on a few samples before any long work, and the batch size that fits a limit."""

from __future__ import annotations

import logging
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from robust_if.gradients import directional
from robust_if.layers import LayerGradients, some
from robust_if.pieces import CHUNK
from robust_if.sweep import Sweep, parse_bytes
from robust_if.task import Batch, Params, Task, batch_length

logger = logging.getLogger(__name__)

Kind = Literal["forward", "directional", "layerwise"]


@dataclass(frozen=True)
class Footprint:
    """Bytes that a pass takes, besides the data set and the interpreter: an estimate, good to a factor of about two.

    Args:
        parameters: of the parameters and the copies of them that the method keeps, whatever the batch size.
        per_sample: of what a batch holds at its peak, for each of its samples.
        gradients: of the per-sample gradients that are formed in chunks, for each sample.
        chunk: the most that one chunk of them takes.
        uncovered: the parameters that no layer rule covers, whose per-sample gradients are held whole.
    """

    parameters: int
    per_sample: int
    gradients: int = 0
    chunk: int = 0
    uncovered: tuple[str, ...] = ()

    def total(self, batch_size: int) -> int:
        """Bytes with batches of ``batch_size``."""
        return self.parameters + batch_size * self.per_sample + min(batch_size * self.gradients, self.chunk)

    def describe(self, batch_size: int) -> str:
        """One line: what takes how much."""
        terms = [f"parameters {text(self.parameters)}", f"{text(self.per_sample)} a sample x {batch_size}"]
        if self.gradients:
            terms.append(f"gradients {text(min(batch_size * self.gradients, self.chunk))}")
        said = f"{' + '.join(terms)} = {text(self.total(batch_size))}"
        return said + (f"; no layer rule for {some(self.uncovered)}, each sample's gradient is held whole" if self.uncovered else "")


def footprint(task: Task, params: Params, probe: Batch, kind: Kind, directions: int = 1) -> Footprint:
    """What a pass takes, measured on the first samples of ``probe`` (at most 4).

    Of the first two kinds the pass itself is made, and every tensor that an operation returns is seen, those of attention and of the loss too; what a
    kernel allocates for a moment is not.

    Args:
        kind: ``"forward"``: the activations alive at once at most; ``"directional"``: those with their tangents, and the parameters with one copy for
            each direction; ``"layerwise"``: what the graph saves, inputs, outputs and output gradients of the layers, and a convolution's patches.
        directions: vectors that the gradients are multiplied with in one pass.

    Raises:
        ValueError: if ``kind`` is not one of these, or ``directions`` is below 1.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {', '.join(map(repr, get_args(Kind)))}, got {kind!r}")
    if directions < 1:
        raise ValueError(f"directions: expected at least 1, got {directions}")
    probe = _head(probe, 4)
    count, size = batch_length(probe), sum(value.nbytes for value in params.values())
    frozen = sum(value.nbytes for value in task.model.state_dict().values()) - size
    if kind == "layerwise":
        return _layerwise(task, params, probe, frozen + size * (1 + directions))
    tangents = directions if kind == "directional" else 0
    direction = {name: torch.zeros_like(value) for name, value in params.items()} if tangents else {}
    own = [*params.values(), *direction.values(), *task.model.state_dict().values()]
    with torch.no_grad(), _Alive(tree_leaves(probe), own) as alive:
        if tangents:
            directional(task, params, probe, direction)
        else:
            task.losses(params, probe)
    return Footprint(frozen + size * (1 + tangents), -(-alive.peak // count))


def plan(footprint: Footprint, sweep: Sweep) -> Sweep:
    """``sweep`` with the largest batch size, at most its own, that fits its ``max_memory``; the log says in one line what it will take.

    Raises:
        ValueError: if one sample does not fit.
    """
    size = sweep.batch_size
    if sweep.max_memory is not None:
        limit = parse_bytes(sweep.max_memory)
        if footprint.total(1) > limit:
            raise ValueError(
                f"max_memory: one sample needs {text(footprint.total(1))} ({footprint.describe(1)}), more than the {text(limit)} that were given"
            )
        size = bisect_right(range(size + 1), limit, key=footprint.total) - 1
    logger.info("memory: %s", footprint.describe(size))
    return replace(sweep, batch_size=size)


def _layerwise(task: Task, params: Params, probe: Batch, fixed: int) -> Footprint:
    uncovered = LayerGradients(task, params, probe).uncovered
    count, kept, layers = batch_length(probe), [], []  # type: int, list[Tensor], list[tuple[nn.Module, Tensor]]

    def keep(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            layers.append((module, output))
            kept.extend([output, *(value for value in args if isinstance(value, Tensor))])

    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    with _hooks(task.model, hook), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        task.losses(leaves, probe)
    own = {value.untyped_storage().data_ptr() for value in (*params.values(), *task.model.state_dict().values())}
    storages = {storage.data_ptr(): storage.nbytes() for storage in (value.untyped_storage() for value in kept)}
    saved = sum(size for pointer, size in storages.items() if pointer not in own)
    gradients = sum(output.nbytes for _, output in layers)
    patches, dense = zip(*[_formed(module, output) for module, output in layers], strict=True) if layers else ((0,), (0,))
    whole = sum(params[name].nbytes for name in uncovered)
    item = max(value.element_size() for value in params.values())
    return Footprint(
        parameters=fixed,
        per_sample=-(-(saved + gradients + max(patches)) // count) + whole,
        gradients=2 * max(dense),
        chunk=2 * CHUNK * item,
        uncovered=tuple(uncovered),
    )


def _formed(module: nn.Module, output: Tensor) -> tuple[int, int]:
    """Bytes of a convolution's unfolded patches for the whole batch, and of one sample's gradient where it has several positions."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2 or isinstance(module, nn.Embedding):
        return 0, 0
    positions = output[0].numel() // len(weight)
    patches = len(output) * positions * weight[0].nbytes if weight.ndim > 2 else 0
    return patches, weight.nbytes if positions > 1 else 0


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are alive at once: ``inputs``, and what operations return, but not what shares memory with ``own``."""

    def __init__(self, inputs: list[Any], own: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.own = {value.untyped_storage().data_ptr() for value in own}
        self.alive: list[weakref.ref[Tensor]] = []
        self.peak = 0
        self._count(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count(tree_leaves(result))
        return result

    def _count(self, made: list[Any]) -> None:
        # the tangent of what does not change is a tensor without memory
        self.alive.extend(weakref.ref(leaf) for leaf in made if isinstance(leaf, Tensor) and not leaf._is_zerotensor())
        there = [(reference, tensor.untyped_storage()) for reference in self.alive if (tensor := reference()) is not None]
        self.alive = [reference for reference, _ in there]
        self.peak = max(
            self.peak, sum(size for pointer, size in {each.data_ptr(): each.nbytes() for _, each in there}.items() if pointer not in self.own)
        )


@contextmanager
def _hooks(model: nn.Module, hook: Any) -> Iterator[None]:
    """A forward hook on every module with parameters of its own."""
    layers = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _head(batch: Batch, length: int) -> Batch:
    """A copy of the first samples, since a view holds the memory of the whole data set."""
    return tree_map(lambda leaf: leaf[:length].clone() if isinstance(leaf, Tensor) else leaf, batch)


def text(size: int) -> str:
    """Bytes for people: 780 MB."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 1000 * scale else f"{size / scale:.0f} {unit}"
    return f"{size} B"
