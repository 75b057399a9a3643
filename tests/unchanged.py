"""What a call must leave as it was: the user's model and the global random state."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


def snapshot(model: nn.Module) -> list[Any]:
    """Everything about a model that a call could leave behind, in a form that compares by ``==``."""
    hooks = [len(value) for m in model.modules() for key, value in vars(m).items() if "hooks" in key and hasattr(value, "__len__")]
    tensors = [(name, value.dtype, value.detach().numpy().tobytes()) for name, value in model.state_dict().items()]
    return [tensors, hooks, [m.training for m in model.modules()], [(p.requires_grad, p.grad, id(p)) for p in model.parameters()]]


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    def now() -> list[Any]:
        numpy = np.random.get_state()
        return [snapshot(model), torch.random.get_rng_state().tolist(), numpy[1].tolist(), numpy[2], random.getstate(), torch.is_grad_enabled()]

    before = now()
    yield
    assert now() == before
