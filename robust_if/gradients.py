"""Derivatives of per-sample losses: the only file that calls autograd, besides the layer rules in ``layers.py`` and products with ``curvature.py``.

Costs are counted in forward passes over the data (F): one directional derivative of all samples costs about 2 F by forward mode and never
holds a per-sample gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from robust_if.task import Batch, Params, Task, batch_length

logger = logging.getLogger(__name__)
_said: set[str] = set()

T = TypeVar("T")


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Inside, the model's derivatives of every order exist and agree with each other.

    Attention and torch's transformer layers take the kernels that have forward-mode rules. The padding row of an embedding is a constant in forward
    mode too: torch leaves it out of gradients only, and without this J and Jᵀ would be of two different functions. Hooks by which gradient
    checkpointing asks for gradients of the embeddings' outputs, which functional transforms do not allow, are put aside.
    """

    def constant(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
        index = args[0] if args else kwargs["input"]
        return torch.where(torch.eq(index, module.padding_idx)[..., None], output.detach(), output)  # type: ignore[arg-type]

    asking = [module._forward_hooks for module in model.modules() if any(map(_asks, module._forward_hooks.values()))]
    before = [dict(hooks) for hooks in asking]
    for hooks in asking:
        for key in [key for key, hook in hooks.items() if _asks(hook)]:
            del hooks[key]
    padded = [module for module in model.modules() if isinstance(module, nn.Embedding) and module.padding_idx is not None]
    handles = [module.register_forward_hook(constant, with_kwargs=True) for module in padded]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
        for hooks, kept in zip(asking, before, strict=True):
            hooks.clear()
            hooks.update(kept)


def _asks(hook: Callable[..., Any]) -> bool:
    """Whether this is the hook that ``enable_input_require_grads`` of transformers registers."""
    return "make_inputs_require_grad" in getattr(hook, "__qualname__", "")


def gradient(function: Callable[[Params], Tensor], params: Params) -> Params:
    """Gradient of a scalar function of the parameters, detached; zero where the function does not depend on one."""
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    with torch.enable_grad():
        grads = torch.autograd.grad(function(leaves), list(leaves.values()), allow_unused=True)
    return {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in zip(leaves.items(), grads, strict=True)}


def hessian(function: Callable[[Params], Tensor], params: Params) -> Tensor:
    """The Hessian of a scalar function over all parameters, ``(p, p)`` in the order of ``params``; memory p², for small models."""
    shapes = {name: value.shape for name, value in params.items()}
    sizes = [value.numel() for value in params.values()]

    def flat(vector: Tensor) -> Tensor:
        parts = torch.split(vector, sizes)
        return function({name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)})

    vector = torch.cat([value.detach().flatten() for value in params.values()])
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        curvature: Tensor = torch.func.hessian(flat)(vector)
    return curvature.detach()


def channels_last(task: Task, params: Params, probe: Batch) -> Params:
    """``params`` with the kernels of convolutions in the memory format in which CPUs pool and convolve two to three times faster.

    The activations follow the kernels, so neither the model nor its input is touched. A model that cannot do with it, such as one that calls ``view``
    on activations, gets its parameters as they are.

    Args:
        probe: a few samples on which this is tried.
    """
    if not any(value.ndim == 4 and value.device.type == "cpu" for value in params.values()):
        return params
    # empty_like, since contiguous() takes a kernel of one input channel for channels-last already
    fast = {
        name: torch.empty_like(value, memory_format=torch.channels_last).copy_(value) if value.ndim == 4 else value for name, value in params.items()
    }
    try:
        with torch.no_grad():
            task.losses(fast, probe)
    except RuntimeError:
        return params
    return fast


def directional(task: Task, params: Params, batch: Batch, direction: Params) -> Tensor:
    """⟨∇ℓᵢ(θ), v⟩ for every sample of the batch, shape ``(B,)``.

    By forward mode, or from per-sample gradients where an operation has no forward rule.

    Args:
        direction: v, with the shapes of ``params``.
    """
    products = forward_mode(task, params, batch, direction, "taking per-sample gradients instead, which is slower")
    if products is not None:
        return products
    grads = per_sample(task, params, batch)
    return torch.stack([(grads[name].flatten(1) @ direction[name].flatten()) for name in params]).sum(0)


def forward_mode(task: Task, params: Params, batch: Batch, direction: Params, instead: str) -> Tensor | None:
    """⟨∇ℓᵢ(θ), v⟩ by ``torch.func.jvp``, ``(B,)``, exact to rounding; ``None`` where an operation has no forward rule, said once in the log.

    Attention is evaluated by the math kernel, since the fused ones have no forward rule.

    Args:
        instead: what is then done instead, for the log.
    """

    def losses(p: Params) -> Tensor:
        return task.losses(p, batch)

    with torch.no_grad(), differentiable(task.model):
        products: Tensor | None = attempt(lambda: torch.func.jvp(losses, (params,), (direction,))[1], "forward-mode", instead)
    return products


def per_sample(task: Task, params: Params, batch: Batch, names: Iterable[str] | None = None) -> Params:
    """Gradients of every sample's loss, ``(B, *shape)`` by name. Memory B · p: the reference, and the fallback where no layer rule exists.

    Args:
        names: the parameters to differentiate; all of ``params`` by default.
    """
    chosen = params if names is None else {name: params[name] for name in names}

    def loss(p: Params, sample: Batch) -> Tensor:
        return task.losses({**params, **p}, tree_map(lambda leaf: leaf[None] if isinstance(leaf, Tensor) else leaf, sample))[0]

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="error")
    with torch.no_grad(), differentiable(task.model):  # no graph back to parameters that do not count
        grads: Params | None = attempt(lambda: gradients(chosen, batch), "vmap", "taking one backward pass per sample instead, which is slower")
    if grads is not None:
        return grads
    singles = [gradient(lambda p, i=i: loss(p, _sample(batch, i)), chosen) for i in range(batch_length(batch))]  # type: ignore[misc]
    return {name: torch.stack([single[name] for single in singles]) for name in chosen}


def _sample(batch: Batch, i: int) -> Batch:
    return tree_map(lambda leaf: leaf[i] if isinstance(leaf, Tensor) else leaf, batch)


def attempt(function: Callable[[], T], rule: str, instead: str) -> T | None:
    """``function()``; ``None`` where torch has no ``rule`` for an operation, said once in the log with what is done ``instead``.

    Memory that runs out, and models that draw random numbers, are errors still.
    """
    try:
        return function()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "random operation" in str(error):
            raise
        message = f"no {rule} rule ({reason(error)}); {instead}"
    if message not in _said:
        _said.add(message)
        logger.warning(message)
    return None


def reason(error: Exception) -> str:
    """The first line of an error, which for torch's own is the one to read."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
