"""What a model computes just before its last layer: the representation in which many attacks and detectors work."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from robust_if.task import Batch, Params, Task, batch_length


def penultimate(task: Task, params: Params, batch: Batch, *, layer: str | None = None) -> Tensor:
    """The features of every sample, ``(B, F)``: the input of the linear layer that is called last; differentiable in ``params`` and in the batch.

    Where a sample has several positions the mean over them is taken: over the second axis of values ``(B, positions, F)``, and over all axes after
    the second for values ``(B, F, …)`` of convolutions. Of a model whose only layer is linear the features are the inputs themselves.

    Args:
        task: the model; it is run once, as for its outputs.
        params: the parameters to run it at.
        batch: the samples.
        layer: the name of a module, as in ``model.named_modules()``, whose output is taken instead.

    Raises:
        ValueError: if there is no such module, the model does not call it, or its value is no tensor with the sample as first axis.
    """
    seen: list[Any] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["input"])

    def after(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output)

    if layer is None:
        linear = [module for module in task.model.modules() if isinstance(module, nn.Linear)]
        handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in linear]
    else:
        handles = [_named(task.model, layer).register_forward_hook(after)]
    try:
        task.outputs(params, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError(f"layer: the model does not call {layer or 'any linear layer'}; name a module whose output are the features")
    value, count = seen[-1], batch_length(batch)
    if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != count:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"layer: expected a tensor ({count}, …), one row per sample, got {got} at {layer or 'the last linear layer'}; name another")
    if value.ndim == 3 and not (layer is not None and isinstance(_named(task.model, layer), nn.Conv1d)):
        return value.mean(1)
    return value.flatten(2).mean(2) if value.ndim > 2 else value


def _named(model: nn.Module, name: str) -> nn.Module:
    names = [each for each, _ in model.named_modules() if each]
    if name not in names:
        raise ValueError(f"layer: the model has no module {name!r}; it has {', '.join(names[-10:])}")
    return model.get_submodule(name)
