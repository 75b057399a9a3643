"""How a denoiser of the diffusers library sees a batch of images, and what it loses per sample; the parts of :meth:`robust_if.Task.from_diffusers`.

A batch is ``(images, condition)``: images or latents ``(B, C, H, W)`` in the scale that the model was trained in, and class labels ``(B,)`` or text
embeddings ``(B, L, D)``, whichever the model takes; a model that takes neither does not look at them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

#: Timesteps of 1,000 at which the loss is taken, from nearly clean to nearly nothing but noise: those of DataInf's experiments with
#: Stable Diffusion (Kwon et al. 2024, arXiv 2310.00902).
TIMESTEPS = (25, 225, 425, 525, 725, 925)

#: What a network may be asked to predict; a scheduler says which.
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Noise:
    """The noise of every timestep: drawn once and added to every image, so that the loss of an image depends on no other.

    Args:
        scheduler: of diffusers; says how much of it there is at a timestep, and what the network predicts.
        timesteps: at which a loss is taken.
        seed: draws the noise, of each timestep for itself.
    """

    scheduler: Any
    timesteps: tuple[int, ...]
    seed: int

    def at(self, timestep: int, images: Tensor) -> Tensor:
        """The noise ``(B, C, H, W)`` of one timestep, the same for each of the images; by numpy, since ``torch.func.vmap`` draws no numbers."""
        drawn = np.random.default_rng((self.seed, timestep)).standard_normal(images.shape[1:])
        return torch.from_numpy(drawn).to(images).expand(images.shape)

    def target(self, images: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """What the network should predict, ``(B, C, H, W)``, at timesteps ``steps (B,)``."""
        kind = self.scheduler.config.prediction_type
        target: Tensor = self.scheduler.get_velocity(images, noise, steps) if kind == "v_prediction" else noise if kind == "epsilon" else images
        return target


@dataclass(frozen=True)
class Denoising:
    """The predictions of a network for noised images, ``(B, T, C, H, W)``: one forward pass for every timestep, which all samples share.

    Args:
        noise: that is added.
        condition: name of the argument by which the network takes the second element of a batch; ``""`` if it takes none.
        classes: number of class embeddings, where labels choose one.
    """

    noise: Noise
    condition: str = ""
    classes: int | None = None

    def __call__(self, model: Callable[..., Any], batch: Any) -> Tensor:
        images = batch[0]
        return torch.stack([self.predict(model, batch, self.noise.at(t, images), _steps(images, t)) for t in self.noise.timesteps], 1)

    def predict(self, model: Callable[..., Any], batch: Any, noise: Tensor, steps: Tensor) -> Tensor:
        """The prediction ``(B, C, H, W)`` for the images with ``noise (B, C, H, W)`` of the timesteps ``steps (B,)``.

        The timesteps are given for each sample, so that every layer, those of the time embedding too, sees the samples on its first axis.

        Raises:
            ValueError: if the images are not images, or the condition is missing or is none of the model's classes.
        """
        images = batch[0]
        if images.ndim != 4 or not images.is_floating_point():
            raise ValueError(f"images: expected floating-point numbers of shape (B, C, H, W), got {images.dtype} of shape {tuple(images.shape)}")
        given = {self.condition: self._checked(batch)} if self.condition else {}
        prediction: Tensor = model(self.noise.scheduler.add_noise(images, noise, steps), steps, return_dict=False, **given)[0]
        return prediction

    def _checked(self, batch: Any) -> Tensor:
        if len(batch) < 2:
            what = "class labels (B,)" if self.condition == "class_labels" else "text embeddings (B, L, D)"
            raise ValueError(f"data: the model is conditional, so a batch is (images, condition) with {what}; got images alone")
        condition: Tensor = batch[1]
        if self.classes is not None:
            if condition.is_floating_point() or condition.ndim != 1:
                raise ValueError(f"labels: expected class numbers of shape (B,), got {condition.dtype} of shape {tuple(condition.shape)}")
            if (out := _outside(condition, self.classes)) is not None:
                raise ValueError(f"labels: the model has {self.classes} classes, 0 to {self.classes - 1}; got {out}")
        return condition


@dataclass(frozen=True)
class DenoisingError:
    """The mean over the timesteps of the mean squared error of the predictions ``(B, T, C, H, W)``, ``(B,)``; all timesteps count alike.

    Source: Ho, Jain and Abbeel 2020 (arXiv 2006.11239), equation 14, at fixed timesteps and noise.
    """

    noise: Noise

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        images = batch[0]
        targets = [self.noise.target(images, self.noise.at(t, images), _steps(images, t)) for t in self.noise.timesteps]
        return _mean_square(outputs, torch.stack(targets, 1))


@dataclass(frozen=True)
class RandomTimesteps:
    """What trains a denoiser: its error at a timestep and with noise that are drawn anew for every sample and step.

    An objective of :class:`robust_if.Recipe`, for tasks of :meth:`robust_if.Task.from_diffusers`, whose own loss has few timesteps and fixed noise.

    Source: Ho, Jain and Abbeel 2020 (arXiv 2006.11239), algorithm 1.
    """

    def __call__(self, task: Any, model: nn.Module, batch: Any, generator: torch.Generator) -> Tensor:
        """Losses of the samples ``(B,)``.

        Raises:
            TypeError: if the task is not one of :meth:`robust_if.Task.from_diffusers`.
        """
        forward = task.forward
        if not isinstance(forward, Denoising):
            raise TypeError(f"task: expected one of Task.from_diffusers, got one whose forward is {forward!r}")
        images, kind = batch[0], forward.noise
        noise = torch.randn(images.shape, generator=generator).to(images)
        steps = torch.randint(kind.scheduler.config.num_train_timesteps, (len(images),), generator=generator).to(images.device)
        return _mean_square(forward.predict(model, batch, noise, steps), kind.target(images, noise, steps))


def denoising(model: Any, scheduler: Any, timesteps: Sequence[int] | None, seed: int) -> Denoising:
    """How ``model`` is called, at ``timesteps`` of ``scheduler``; :data:`TIMESTEPS` in proportion to its number of steps by default.

    Raises:
        ValueError: if the model is no denoiser of this kind, the scheduler adds no noise or not by timesteps, or a timestep or the seed is no number
            that it may be.
    """
    steps = _scheduled(scheduler)
    found = tuple(dict.fromkeys(t * steps // 1000 for t in TIMESTEPS)) if timesteps is None else tuple(timesteps)
    if not found or any(isinstance(t, bool) or not isinstance(t, (int, np.integer)) or not 0 <= t < steps for t in found):
        raise ValueError(f"timesteps: expected whole numbers from 0 to {steps - 1}, of which the scheduler has {steps}; got {found}")
    if len(set(found)) < len(found):
        raise ValueError(f"timesteps: expected each of them once, since its noise is drawn once; got {found}")
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed: expected a whole number of at least 0, got {seed!r}")
    return Denoising(Noise(scheduler, tuple(map(int, found)), int(seed)), *_condition(model))


def _scheduled(scheduler: Any) -> int:
    """The scheduler's number of timesteps, once it has been checked."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    steps = getattr(config, "num_train_timesteps", None)
    if not hasattr(scheduler, "add_noise") or steps is None:
        raise ValueError(f"scheduler: expected one of diffusers with add_noise(images, noise, timesteps), such as DDPMScheduler, got {name}")
    if hasattr(scheduler, "sigmas"):
        raise ValueError(f"scheduler: {name} counts noise by sigmas and not by timesteps; use DDPMScheduler.from_config(scheduler.config)")
    kind = getattr(config, "prediction_type", None)
    if kind not in PREDICTIONS or (kind == "v_prediction" and not hasattr(scheduler, "get_velocity")):
        raise ValueError(f"scheduler: expected the prediction type {', '.join(map(repr, PREDICTIONS))}, got {kind!r} of {name}")
    return int(steps)


def _condition(model: Any) -> tuple[str, int | None]:
    """The name by which the model takes its condition, ``""`` without one, and its number of classes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, takes = getattr(base, "config", None), list(inspect.signature(base.forward).parameters) if isinstance(base, nn.Module) else []
    if config is None or takes[:2] != ["sample", "timestep"]:
        raise ValueError(f"model: expected UNet2DModel, UNet2DConditionModel or another of diffusers that is called alike, got {type(base).__name__}")
    if config.out_channels != config.in_channels:
        raise ValueError(f"model: it takes {config.in_channels} channels and predicts {config.out_channels}; expected as many")
    classes, by_class = getattr(config, "num_class_embeds", None), getattr(base, "class_embedding", None) is not None
    if "encoder_hidden_states" not in takes:
        return "class_labels" if by_class else "", classes if by_class and config.class_embed_type is None else None
    if by_class or getattr(config, "addition_embed_type", None) is not None:
        raise ValueError("model: it is conditional on more than text embeddings, and a batch has one condition")
    return "encoder_hidden_states", None


def _steps(images: Tensor, timestep: int) -> Tensor:
    return torch.full((len(images),), timestep, device=images.device)


def _outside(labels: Tensor, classes: int) -> int | None:
    """A label that is none; ``None`` also where the values cannot be looked at, inside ``torch.func.vmap``."""
    try:
        low, high = int(labels.min()), int(labels.max())
    except RuntimeError:
        return None
    return low if low < 0 else high if high >= classes else None


def _mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """``(B,)``, in single precision where the model's is half."""
    outputs = outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
    return ((outputs - targets.to(outputs)) ** 2).flatten(1).mean(1)


@torch.no_grad()
def generate(model: Any, scheduler: Any, labels: ArrayLike | Tensor, *, steps: int = 50, seed: int = 0) -> Tensor:
    """Images of the given classes, ``(n, C, H, W)`` in the model's scale: of class-conditional models, for which diffusers has no pipeline.

    Args:
        model: in evaluation mode, such as a ``UNet2DModel``.
        scheduler: how they are sampled; ``DDIMScheduler.from_config(...)`` of the one that the model was trained with needs few steps. It stays as
            it is.
        labels: class numbers ``(n,)``.
        steps: of the sampling.
        seed: draws the noise that the images begin as.

    Raises:
        ValueError: if the model is in training mode, is not class-conditional, or does not say how large its images are.
    """
    condition, classes = _condition(model)
    if condition != "class_labels" or model.training or model.config.sample_size is None:
        raise ValueError("model: expected a class-conditional one in evaluation mode whose config has a sample_size")
    like, chosen = next(model.parameters()), torch.as_tensor(labels)
    if classes is not None and (out := _outside(chosen, classes)) is not None:
        raise ValueError(f"labels: the model has {classes} classes, 0 to {classes - 1}; got {out}")
    size = model.config.sample_size
    shape = (len(chosen), model.config.in_channels, *((size, size) if isinstance(size, int) else size))
    generator, sampler = torch.Generator().manual_seed(seed), copy.deepcopy(scheduler)
    sampler.set_timesteps(steps, device=like.device)
    images: Tensor = torch.randn(shape, generator=generator).to(like) * sampler.init_noise_sigma
    for t in sampler.timesteps:
        prediction = model(sampler.scale_model_input(images, t), t, class_labels=chosen.to(like.device), return_dict=False)[0]
        images = sampler.step(prediction, t, images, generator=generator).prev_sample
    return images
