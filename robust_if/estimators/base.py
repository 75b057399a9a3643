"""What every estimator shares: one call that turns (task, data, target) into one score per sample."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust_if.checkpoints import Checkpoint
from robust_if.data import Samples, as_samples, to
from robust_if.scores import Scores, Units
from robust_if.sweep import Sweep, fingerprint
from robust_if.targets import Target
from robust_if.task import Batch, Params, Task


@dataclass(frozen=True)
class Job:
    """One scoring run at one state of the model."""

    task: Task
    train: Samples
    samples: Samples
    target: Target | None
    sweep: Sweep
    name: str
    settings: str = ""

    @property
    def params(self) -> Params:
        """The task's parameters."""
        return self.task.params()

    def map(self, function: Callable[[Batch], Tensor], *settings: object) -> NDArray[np.float64]:
        """``function: Batch -> (B,)`` of every sample, ``(n,)``; resumes where the sweep keeps its parts."""
        mark = ""
        if self.sweep.directory is not None:
            held_out = self.target.held_out if self.target else ()
            data = [fingerprint({}, part) for part in (self.train, *held_out)]
            task = self.task
            mark = fingerprint(
                task.model.state_dict(), self.samples, self.name, task.patterns, task.loss, task.forward, self.settings, self.target, settings, data
            )
        like = next(self.task.model.parameters())
        return self.sweep.map(function, self.samples, like, name=self.name, fingerprint=mark).numpy()

    def probe(self) -> Batch:
        """A few samples on the model's device, on which layer rules are verified."""
        return to(self.samples.batch(slice(0, 4)), next(self.task.model.parameters()))


@dataclass(frozen=True)
class Result:
    """What an estimator gives for one job: values ``(n,)``, members ``(k, n)`` of an ensemble, suggested labels ``(n,)``, and notes."""

    values: NDArray[np.float64]
    members: NDArray[np.float64] | None = None
    suggestions: NDArray[np.int64] | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Estimator(ABC):
    """Turns a task, training data and a target into one score per sample; positive = harmful.

    Subclasses are frozen dataclasses whose fields are the hyper-parameters, and give ``name`` and ``estimate``.
    """

    units: ClassVar[Units] = "rank"
    #: Whether the estimator looks at a target; the cheapest baselines do not.
    needs_target: ClassVar[bool] = True

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables and files, such as ``"ip"``."""

    @abstractmethod
    def estimate(self, job: Job) -> Result:
        """The scores at one state of the model."""

    def score(
        self,
        task: Task,
        train: Any,
        *,
        target: Target | None = None,
        checkpoints: Sequence[Checkpoint] = (),
        samples: Any = None,
        sweep: Sweep = Sweep(),  # noqa: B008 - frozen
    ) -> Scores:
        """One score per sample; positive: leaving the sample out is predicted to lower the target.

        Args:
            task: the model, in evaluation mode, and its loss.
            train: training data, ``Samples``, ``(X, y)`` or a map-style data set.
            target: what should become lower; estimators that look at no target ignore it.
            checkpoints: states of the model; scores are summed with the checkpoints' weights (TracIn). The model's own state by default.
            samples: what is scored, where it is not ``train`` itself: candidates for the training set, or other labels.
            sweep: batch size, progress, and where parts are kept to resume.

        Returns:
            Scores ``(n,)`` in the order of ``samples``.

        Raises:
            ValueError: if the estimator needs a target and none is given.
        """
        if self.needs_target and target is None:
            raise ValueError(f"target: {type(self).__name__} needs a target, such as Utility(valid)")
        begin = time.perf_counter()
        data = as_samples(train)
        scored = data if samples is None else as_samples(samples)
        asked = target.name if target and self.needs_target else ""
        job = Job(task, data, scored, target, sweep, f"{self.name}-{asked}" if asked else self.name, repr(self))
        jobs = (replace(job, task=task.at(each.state), name=f"{job.name}-{k}") for k, each in enumerate(checkpoints)) if checkpoints else [job]
        results = [self.estimate(each) for each in jobs]  # one copy of the model at a time
        weights = np.array([checkpoint.weight for checkpoint in checkpoints] or [1.0])
        members = [result.members for result in results if result.members is not None]
        return Scores(
            values=np.tensordot(weights, np.stack([result.values for result in results]), 1),
            ids=scored.ids,
            estimator=self.name,
            target=asked,
            units=self.units,
            members=np.tensordot(weights, np.stack(members), 1) if members else None,
            suggestions=results[-1].suggestions,
            provenance={"estimator": repr(self), "seconds": time.perf_counter() - begin, "torch": torch.__version__, **results[-1].notes},
        )
