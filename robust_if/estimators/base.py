"""What every estimator shares: one call that turns (task, data, target) into one score per sample."""

from __future__ import annotations

import hashlib
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust_if.checkpoints import Checkpoint
from robust_if.data import Samples, as_samples, to
from robust_if.gradients import channels_last, directional, forward_mode
from robust_if.layers import LayerGradients
from robust_if.memory import Kind, footprint, plan
from robust_if.pieces import Pieces, products
from robust_if.scores import Scores, Units
from robust_if.store import Store
from robust_if.sweep import Sweep, fingerprint
from robust_if.targets import Target
from robust_if.task import Batch, Params, Task

#: Share of the parameters that count, below which the factors of a backward pass cost less than forward mode.
FEW = 0.1


@dataclass(frozen=True)
class Job:
    """One scoring run at one state of the model."""

    task: Task
    train: Samples
    samples: Samples
    targets: tuple[Target, ...]
    sweep: Sweep
    name: str
    settings: str = ""
    index: Store | None = None
    checkpoint: Checkpoint | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def params(self) -> Params:
        """The task's parameters, in the memory format in which they are evaluated fastest."""
        return channels_last(self.task, self.task.params(), self.probe())

    @property
    def target(self) -> Target:
        """The only target."""
        (target,) = self.targets
        return target

    def map(self, function: Callable[[Batch], Tensor], *settings: object, kind: Kind = "forward", directions: int = 1) -> NDArray[np.float64]:
        """``function: Batch -> (B, …)`` of every sample, ``(n, …)``; resumes where the sweep keeps its parts.

        Args:
            kind: what ``function`` does, for the memory plan that is logged before the work and that batches are made to fit.
            directions: how many vectors the gradients are multiplied with.
        """
        mark = ""
        if self.sweep.directory is not None:
            data = [fingerprint({}, part) for part in (self.train, *(part for target in self.targets for part in target.held_out))]
            task = self.task
            mark = fingerprint(
                task.model.state_dict(), self.samples, self.name, task.patterns, task.loss, task.forward, self.settings, self.targets, settings, data
            )
        sweep = plan(footprint(self.task, self.params, self.probe(), kind, directions), self.sweep)
        like = next(self.task.model.parameters())
        return sweep.map(function, self.samples, like, name=self.name, fingerprint=mark, notes=self.notes).numpy()

    def layerwise(self, function: Callable[[Pieces], Tensor]) -> NDArray[np.float64]:
        """``function: gradients of a batch -> (B, …)`` of every sample, ``(n, …)``; from the index where there is one."""
        if self.index is not None:
            parts = [function(pieces) for _, pieces in self.index.blocks()]
            return torch.cat(parts).to("cpu", torch.float64).numpy()
        gradients = LayerGradients(self.task, self.params, self.probe())
        return self.map(lambda batch: function(gradients.pieces(batch)), kind="layerwise")

    def products(self, directions: Sequence[Params]) -> NDArray[np.float64]:
        """⟨∇ℓ_i, v⟩ for every sample and direction, ``(n, k)``.

        One direction goes by forward mode, which holds no activations; several go from the factors of one backward pass. So does one where an
        operation has no forward rule, or few of the parameters count, as in an adapter: forward mode multiplies by the tangents of frozen weights
        too, though they are 0. Where a parameter has no layer rule, it is forward mode for all.
        """
        task, params = self.task, self.params
        counted, all_of_them = (sum(value.numel() for value in values) for values in (params.values(), task.model.parameters()))
        stacked = {name: torch.stack([direction[name] for direction in directions]) for name in params}

        def from_factors(pieces: Pieces) -> Tensor:
            return torch.stack([products(each, stacked[name]) for name, each in pieces]).sum(0)

        if self.index is not None:
            return self.layerwise(from_factors)
        instead = "taking the layers' factors instead, where all layers have a rule"
        if len(directions) > 1 or counted < FEW * all_of_them or forward_mode(task, params, self.probe(), directions[0], instead) is None:
            gradients = LayerGradients(task, params, self.probe())
            if not gradients.uncovered:
                return self.map(lambda batch: from_factors(gradients.pieces(batch)), kind="layerwise", directions=len(directions))
        return self.map(lambda batch: torch.stack([directional(task, params, batch, each) for each in directions], 1), kind="directional")

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

    @property
    def summary(self) -> str:
        """What it is, in one line."""
        return (type(self).__doc__ or "").strip().split("\n")[0]

    def check(self, task: Task) -> None:
        """Raise a ``ValueError`` if the estimator cannot serve this task; called before any long work, a training among it."""
        return

    @abstractmethod
    def estimate(self, job: Job) -> Result:
        """The scores for the job's target, at one state of the model."""

    def estimates(self, job: Job) -> list[Result]:
        """One result per target of the job; estimators that can serve all in one pass override this."""
        if len(job.targets) < 2:
            return [self.estimate(job)]
        return [self.estimate(replace(job, targets=(target,), name=f"{job.name}-{k}")) for k, target in enumerate(job.targets)]

    @overload
    def score(
        self, task: Task, train: Any, *, target: Target | None = ..., checkpoints: Sequence[Checkpoint] = ..., samples: Any = ...,
        sweep: Sweep = ..., index: Store | None = ...,
    ) -> Scores: ...  # fmt: skip

    @overload
    def score(
        self, task: Task, train: Any, *, target: Sequence[Target] | Mapping[str, Target], checkpoints: Sequence[Checkpoint] = ...,
        samples: Any = ..., sweep: Sweep = ..., index: Store | None = ...,
    ) -> list[Scores]: ...  # fmt: skip

    def score(
        self,
        task: Task,
        train: Any,
        *,
        target: Target | Sequence[Target] | Mapping[str, Target] | None = None,
        checkpoints: Sequence[Checkpoint] = (),
        samples: Any = None,
        sweep: Sweep = Sweep(),  # noqa: B008 - frozen
        index: Store | None = None,
    ) -> Scores | list[Scores]:
        """One score per sample; positive: leaving the sample out is predicted to lower the target.

        Args:
            task: the model, in evaluation mode, and its loss.
            train: training data, ``Samples``, ``(X, y)`` or a map-style data set.
            target: what should become lower; estimators that look at no target ignore it. Several targets, as a list or as a dict with names of
                your own, are scored in one pass where the estimator can.
            checkpoints: states of the model; scores are summed with the checkpoints' weights (TracIn), or averaged with them where they have the
                target's unit. The model's own state by default.
            samples: what is scored, where it is not ``train`` itself: candidates for the training set, or other labels.
            sweep: batch size, progress, and where parts are kept to resume.
            index: the factored gradients of ``train`` at the task's parameters, made by :meth:`robust_if.Store.build`; estimators that work on
                per-sample gradients then need no pass over the data.

        Returns:
            Scores ``(n,)`` in the order of ``samples``; a list of them, in the order of the targets, for several targets.

        Raises:
            ValueError: if the estimator needs a target and none is given, two targets have one name, a target is measured on the training data that
                has to be on others, or the index is of another model or data.
        """
        begin = time.perf_counter()
        self.check(task)
        named = self._named(target)
        data = as_samples(train)
        for each in named.values():
            each.check(data)
        scored = data if samples is None else as_samples(samples)
        if index is not None:
            if checkpoints or samples is not None:
                raise ValueError("index: it holds the gradients of the training data at one state; do not pass checkpoints or samples with it")
            index.check(task, data)
        name = f"{self.name}-{_folder(named)}" if named else self.name
        job = Job(task, data, scored, tuple(named.values()), sweep, name, repr(self), index)
        jobs = (replace(job, task=task.at(each.state), name=f"{name}-{k}", checkpoint=each) for k, each in enumerate(checkpoints))
        results = [self.estimates(each) for each in jobs] if checkpoints else [self.estimates(job)]  # one copy of the model at a time
        weights = np.array([checkpoint.weight for checkpoint in checkpoints] or [1.0])
        provenance = {"estimator": repr(self), "seconds": time.perf_counter() - begin, "torch": torch.__version__, **job.notes}
        scores = [
            self._scores([result[k] for result in results], weights, scored, each, provenance) for k, each in enumerate(named or {"": None})
        ]
        return scores[0] if target is None or isinstance(target, Target) else scores

    def _named(self, target: Target | Sequence[Target] | Mapping[str, Target] | None) -> dict[str, Target]:
        """The targets by name; none for an estimator that looks at none."""
        if not self.needs_target:
            return {}
        given = [target] if isinstance(target, Target) else target
        if not given:
            raise ValueError(f"target: {type(self).__name__} needs a target, such as Utility(valid)")
        if isinstance(given, Mapping):
            return dict(given)
        names = [each.name for each in given]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"target: two targets are named {twice[0]!r}; pass a dict with names of your own, {{'young': …, 'old': …}}")
        return dict(zip(names, given, strict=True))

    def _scores(
        self, results: list[Result], weights: NDArray[np.float64], scored: Samples, target: str, provenance: dict[str, Any]
    ) -> Scores:
        """Results at the checkpoints, summed with their weights; their weighted mean where a score has the target's unit."""
        weights = weights / weights.sum() if self.units == "target" else weights
        members = [result.members for result in results if result.members is not None]
        notes = dict(results[-1].notes)
        if "converged" in notes:
            notes["converged"] = all(result.notes["converged"] for result in results)
        return Scores(
            values=np.tensordot(weights, np.stack([result.values for result in results]), 1),
            ids=scored.ids,
            estimator=self.name,
            target=target,
            units=self.units,
            members=np.tensordot(weights, np.stack(members), 1) if members else None,
            suggestions=results[-1].suggestions,
            provenance={**provenance, **notes},
        )


def _folder(names: Iterable[str]) -> str:
    """The targets' names as the name of a folder; a digest where they are many, or hold what has no place in a path."""
    text = "+".join(names)
    return text if re.fullmatch(r"[\w+-]{1,60}", text) else hashlib.sha256(text.encode()).hexdigest()[:16]
