"""Data sets as numbers, and the model that is to be trained on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from robust_if import models
from robust_if.data import Samples
from robust_if.encoding import Encoder, check_apart, check_split
from robust_if.loading import Dataset
from robust_if.task import Task


@dataclass(frozen=True, eq=False)
class Problem:
    """Encoded training, validation and (where there is one) test data with an untrained model; every check that needs no long work has passed."""

    encoder: Encoder
    train: Samples
    valid: Samples
    test: Samples | None
    model: str
    seed: int

    @classmethod
    def of(cls, train: Dataset, valid: Dataset, test: Dataset | None = None, *, model: str, seed: int = 0) -> Problem:
        """The problem of learning ``train`` with the model called ``model``.

        Raises:
            ValueError: if the splits overlap or do not fit each other, or the model fails on the data.
        """
        check_split(train, valid)
        if test is not None:
            check_apart(train, test, "test")
        encoder = Encoder.fit(train)
        encoded = [None if data is None else _encoded(encoder, data, name) for name, data in (("train", train), ("valid", valid), ("test", test))]
        assert encoded[0] is not None
        assert encoded[1] is not None
        problem = cls(encoder, encoded[0], encoded[1], encoded[2], model, seed)
        problem.tried(lambda task: task)
        return problem

    def task(self, seed: int | None = None) -> Task:
        """The model with initial parameters drawn from ``seed``, the problem's own by default."""
        return Task(models.build(self.model, self.encoder.shape, len(self.encoder.classes), self.seed if seed is None else seed))

    def tried(self, use: Callable[[Task], object]) -> None:
        """Try the untrained model on two samples, and ``use`` on it: whatever the user's own code raises is an error in the argument ``model``."""
        classes = len(self.encoder.classes)
        try:
            task = self.task()
            with torch.no_grad():
                outputs = task.outputs(task.params(), self.train.batch(slice(0, 2)))
            use(task)
        except Exception as error:
            message = str(error)
            raise ValueError(
                message if message.startswith("model: ") else f"model: {self.model} failed: {type(error).__name__}: {message}"
            ) from error
        if not isinstance(outputs, torch.Tensor) or outputs.shape[1:] != (classes,):
            got = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
            raise ValueError(f"model: expected one output per class, shape (B, {classes}), got {got}")


def _encoded(encoder: Encoder, data: Dataset, name: str) -> Samples:
    try:
        return encoder.samples(data)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
