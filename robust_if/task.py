"""A model with its per-sample loss, as a function of the parameters.

Everything in robust-if differentiates ``task.losses(params, batch)``. The user's module is never changed: parameters are arguments
(``torch.func.functional_call``), and a training step works on a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten

from robust_if.denoising import Denoising, DenoisingError, denoising
from robust_if.token_losses import Kind, NextToken, Reading, Reduction, adapter, reading

Params = dict[str, Tensor]
Batch = Any
Model = Callable[..., Any]


def cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of every sample, shape ``(B,)``; ``batch`` is ``(x, y)`` with integer labels ``y`` of shape ``(B,)``."""
    return nn.functional.cross_entropy(outputs, batch[1], reduction="none")


def first_input(model: Model, batch: Batch) -> Tensor:
    """The model applied to the first element of the batch."""
    outputs: Tensor = model(batch[0])
    return outputs


@dataclass(frozen=True, eq=False)
class Task:
    """A model, its per-sample loss, and which of its parameters count.

    Args:
        model: a module in evaluation mode. Score a copy that is frozen: batch normalisation and dropout then act the same on every batch.
        loss: ``(outputs, batch) -> (B,)``, one loss per sample; cross-entropy on ``(x, y)`` by default.
        forward: ``(model, batch) -> outputs``; ``model(batch[0])`` by default. ``model`` is a callable with the parameters bound.
        parameters: shell-style patterns of the parameter names that are differentiated, for example ``"fc.*"`` or ``("*lora_A*",)``.
        start: the state that a training from the beginning starts from, such as ``model.state_dict()`` before a fine-tuning; drawn by the modules
            themselves by default.

    Raises:
        ValueError: if the model is in training mode, or a pattern matches no parameter.
    """

    model: nn.Module
    loss: Callable[[Any, Batch], Tensor] = cross_entropy
    forward: Callable[[Model, Batch], Any] = first_input
    parameters: str | tuple[str, ...] = "*"
    start: Mapping[str, Tensor] | None = field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        training = [name or type(module).__name__ for name, module in self.model.named_modules() if module.training]
        if training:
            raise ValueError(
                f"model: expected a module in evaluation mode, got one in training mode ({training[0]}); call model.eval() first, "
                "otherwise dropout and batch statistics make the score of a sample depend on its batch"
            )
        names = [name for name, _ in self.model.named_parameters()]
        for pattern in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(f"parameters: the pattern {pattern!r} matches none of the model's {len(names)} parameters, such as {names[:5]}")

    @classmethod
    def from_transformers(
        cls, model: Any, tokenizer: Any, kind: Kind = "causal-lm", *, reduction: Reduction = "sum", parameters: str | tuple[str, ...] | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> Task:  # fmt: skip
        """A model of Hugging Face as a task on what :func:`robust_if.language.encode` makes of texts; nothing is ever downloaded.

        Args:
            model: in evaluation mode: a language model, a sequence classifier, or one of PEFT, of which the adapter's parameters alone count.
            tokenizer: the model's own.
            kind: ``"causal-lm"``, whose loss is that of the next token, where it is learnt; or ``"classification"``.
            reduction: of a language model's losses over a sample's tokens: their sum, or their mean.
            parameters: patterns of the parameters that count, instead.
            start: the model's state before it was fine-tuned, for estimators that train anew, such as label odds.

        Raises:
            ValueError: if model and tokenizer do not fit each other or ``kind``, the weights are quantised, or no parameter matches.
        """
        if reduction not in get_args(Reduction):
            raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
        read: Reading = reading(model, tokenizer, kind)
        loss = NextToken(reduction) if kind == "causal-lm" else cross_entropy
        return cls(model, loss, read, adapter(model) if parameters is None else parameters, start=start)

    @classmethod
    def from_diffusers(
        cls, model: Any, scheduler: Any, *, timesteps: Sequence[int] | None = None, seed: int = 0, parameters: str | tuple[str, ...] | None = None
    ) -> Task:
        """A denoiser of the diffusers library as a task on ``(images, condition)``; nothing is ever downloaded.

        The loss of a sample is its mean squared prediction error over fixed timesteps, with noise that is drawn once for each of them and that all
        samples share. Train such a model by ``Recipe(objective=RandomTimesteps())`` of :mod:`robust_if.denoising`.

        Args:
            model: in evaluation mode: ``UNet2DModel``, on ``(images, labels)`` if it is class-conditional, or ``UNet2DConditionModel``, on
                ``(latents, text embeddings)``; of one with an adapter of PEFT the adapter's parameters alone count.
            scheduler: the one that it was trained with, such as ``DDPMScheduler``; says what the model predicts: the noise, the image, or velocity.
            timesteps: at which the loss is taken; by default 25, 225, 425, 525, 725 and 925 of 1,000, in proportion to the scheduler's number.
            seed: draws the noise.
            parameters: patterns of the parameters that count, instead.

        Raises:
            ValueError: if the model is in training mode or is no such denoiser, the scheduler cannot add noise, a timestep is none of its own, or no
                parameter matches; on use, if the condition of a conditional model is missing.
        """
        forward: Denoising = denoising(model, scheduler, timesteps, seed)
        return cls(model, DenoisingError(forward.noise), forward, adapter(model) if parameters is None else parameters)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The name patterns as a tuple."""
        return (self.parameters,) if isinstance(self.parameters, str) else tuple(self.parameters)

    def params(self) -> Params:
        """The parameters that count, detached, by name; they share memory with the model."""
        return {
            name: value.detach()
            for name, value in self.model.named_parameters()
            if any(fnmatchcase(name, pattern) for pattern in self.patterns)
        }

    def outputs(self, params: Params, batch: Batch) -> Any:
        """What the model returns for ``batch`` at ``params``; parameters and buffers that are not given are the model's own."""

        def model(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.model, params, args, kwargs)

        return self.forward(model, batch)

    def losses(self, params: Params, batch: Batch) -> Tensor:
        """One loss per sample, shape ``(B,)``.

        Raises:
            ValueError: if the loss function returns anything but one value per sample.
        """
        losses = self.loss(self.outputs(params, batch), batch)
        if losses.ndim != 1 or len(losses) != batch_length(batch):
            raise ValueError(
                f"loss: expected one loss per sample, shape ({batch_length(batch)},), got shape {tuple(losses.shape)}; "
                "use reduction='none' and sum or average over the positions of a sample, never over samples"
            )
        return losses

    def at(self, state: Mapping[str, Tensor]) -> Task:
        """The same task with a copy of the model that holds ``state`` (parameters and buffers by name)."""
        model = copy.deepcopy(self.model)
        check_state(model, state)
        model.load_state_dict(dict(state), strict=False)
        return replace(self, model=model)

    def reset(self, seed: int) -> Task:
        """The same task with a copy of the model in the state ``start``, or whose parameters that count are drawn afresh.

        They are drawn by the modules' own ``reset_parameters``; a module none of whose parameters count, such as a pretrained backbone, stays as it
        is. An adapter of LoRA is drawn as PEFT does it, so that it changes nothing at first.

        Raises:
            ValueError: if a module holds parameters that count but cannot draw them; give it a method ``reset_parameters``, or the task a ``start``.
        """
        if self.start is not None:
            return self.at(self.start)
        model, counted = copy.deepcopy(self.model), self.params()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            drawn: set[nn.Module] = set()
            for name, module in model.named_modules():
                if (adapters := getattr(module, "reset_lora_parameters", None)) is not None:
                    for adapter_name in (*module.lora_A, *module.lora_embedding_A):
                        adapters(adapter_name, True)
                    drawn |= set(module.modules())
                if module in drawn:
                    continue
                own = [f"{name}.{local}" if name else local for local, _ in module.named_parameters(recurse=False)]
                if not any(each in counted for each in own):
                    continue
                draw = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
                if draw is None:
                    raise ValueError(
                        f"model: {name or type(module).__name__} has parameters but no reset_parameters(), so it cannot start afresh; "
                        "give the task the state before the training, start=state"
                    )
                draw()
        return replace(self, model=model)


def check_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` that names the first entry of ``state`` which the model does not have, or has in another shape."""
    own = model.state_dict()
    for name, value in state.items():
        if name not in own:
            raise ValueError(f"checkpoint: it holds {name!r}, which the model does not have; the model has {list(own)[:5]} …")
        if own[name].shape != value.shape:
            raise ValueError(f"checkpoint: {name!r} has shape {tuple(value.shape)}, the model expects {tuple(own[name].shape)}")


def batch_length(batch: Batch) -> int:
    """Number of samples in a batch: the length of its first tensor, in any nesting of tuples, lists and mappings."""
    leaves, _ = tree_flatten(batch)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            return len(leaf)
    raise ValueError(f"batch: expected at least one tensor, got {type(batch).__name__}")
