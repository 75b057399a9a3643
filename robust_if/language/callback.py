"""What a training run with the ``Trainer`` of Hugging Face must leave behind for TracIn and LESS."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.modeling_utils import unwrap_model

from robust_if.checkpoints import Checkpoint, Moments, load_checkpoint
from robust_if.task import Task
from robust_if.writing import write_json

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,})\.safetensors")


class KeepCheckpoints(TrainerCallback):
    """Keeps states of the model along a ``Trainer``'s run: the parameters that are trained, their weight in TracIn's sum, and Adam's moments.

    The weight is that of :meth:`robust_if.Recipe.weight`, the learning rate summed over the epochs since the state kept before: here the sum of
    the steps' rates, over the steps of an epoch. Of an adapter only its own parameters are written. A run that is resumed from one of the
    ``Trainer``'s checkpoints goes on in the same directory; states from after that checkpoint are made anew.

    Args:
        directory: where the files are, one for each state; :func:`checkpoints` reads them.
        every: ``"epoch"``, or a number of steps. The last state of a run is always kept.
        keep: how many of these there are at most, evenly spaced over the run, as in :class:`robust_if.Recipe`; all by default.

    Raises:
        ValueError: if ``every`` or ``keep`` is out of range; and as the training begins, if ``directory`` holds another run's states, or the
            parameters are sharded over processes.

    Source: Pruthi et al. 2020 (arXiv 2002.08484), section 3; the moments are for Xia et al. 2024 (arXiv 2402.04333).
    """

    def __init__(self, directory: str | Path, every: Literal["epoch"] | int = "epoch", keep: int | None = None) -> None:
        if every != "epoch" and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f"every: expected 'epoch' or a number of steps of at least 1, got {every!r}")
        if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 1):
            raise ValueError(f"keep: expected a whole number of at least 1, got {keep!r}")
        self.directory, self.every, self.keep = Path(directory), every, keep
        #: The learning rates of all steps so far, summed, by the step after which that was noted.
        self._rates: dict[int, float] = {}
        self._total, self._epoch, self._due = 0.0, 1, frozenset[int]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            raise ValueError("KeepCheckpoints: the parameters are sharded over processes (FSDP or DeepSpeed), which it does not put together")
        self._epoch = _steps_per_epoch(args, state, given.get("train_dataloader"))
        self._due = self._planned(state.max_steps)
        self._rates, self._total = {0: 0.0}, 0.0
        if not state.is_world_process_zero:
            return
        found = _files(self.directory)
        if state.global_step == 0:
            if found:
                raise ValueError(f"directory: {self.directory} holds {len(found)} checkpoints of another run; choose another, or delete them")
            return
        self._rates |= _read_rates(self._noted)
        if state.global_step not in self._rates:
            raise ValueError(
                f"directory: {self.directory} does not say what the learning rates were up to step {state.global_step}, where the training "
                "resumes; expected the directory of the run that is resumed"
            )
        self._rates = {step: total for step, total in self._rates.items() if step <= state.global_step}
        self._total = self._rates[state.global_step]
        for step, path in found.items():
            if step > state.global_step:
                logger.warning("%s is of a step after %d, where the training resumes: it is made anew", path, state.global_step)
                path.unlink()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **given: Any) -> None:
        rates = {float(group["lr"]) for group in optimizer.param_groups}
        if len(rates) > 1 and state.global_step == 0:
            logger.warning("the parameters have different learning rates (%s); the mean stands for them", ", ".join(map(str, sorted(rates))))
        self._total += sum(rates) / len(rates)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step in self._due:
            self._save(state, **given)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The ``Trainer`` can be resumed from here, so the sum of the rates must be known here."""
        if state.is_world_process_zero:
            self._note(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """A run that stops before its time ends here; the model that training ends with may be an earlier one."""
        if control.should_training_stop and state.global_step not in self._due:
            self._save(state, **given)

    def _planned(self, steps: int) -> frozenset[int]:
        """The steps after which a state is kept."""
        every = self._epoch if self.every == "epoch" else int(self.every)
        points = [*range(every, steps, every), steps]
        keep = len(points) if self.keep is None else min(self.keep, len(points))
        return frozenset(points[round((i + 1) * len(points) / keep) - 1] for i in range(keep))

    def _save(self, state: Any, model: nn.Module, optimizer: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        trained = _trained(model)
        since = self._rates[max([0, *_files(self.directory)])]
        weight = (self._total - since) / self._epoch
        values = {name: value.detach().cpu().clone().contiguous() for name, value in trained.items()}
        self.directory.mkdir(parents=True, exist_ok=True)
        self._note(state.global_step)
        Checkpoint(values, weight, Moments.of(optimizer, trained)).save(_path(self.directory, state.global_step))
        logger.info("kept %d parameters after step %d, weight %.3g", len(values), state.global_step, weight)

    def _note(self, step: int) -> None:
        self._rates[step] = self._total
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self._noted, self._rates)

    @property
    def _noted(self) -> Path:
        return self.directory / "rates.json"


def checkpoints(directory: str | Path, task: Task | None = None) -> list[Checkpoint]:
    """The states that :class:`KeepCheckpoints` kept, in the order of training.

    Args:
        directory: where they are.
        task: what they are for; that they hold all its parameters is checked then.

    Raises:
        ValueError: if there is none, a file is damaged, or it does not fit the task.
    """
    found = _files(Path(directory))
    if not found:
        raise ValueError(f"directory: {directory} holds no checkpoints; expected the directory that a KeepCheckpoints was given")
    return [load_checkpoint(path, task) for path in found.values()]


def _path(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}.safetensors"


def _files(directory: Path) -> dict[int, Path]:
    """The files by step, the earliest first."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    steps = sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))
    return {step: _path(directory, step) for step in steps}


def _read_rates(path: Path) -> dict[int, float]:
    try:
        return {int(step): float(total) for step, total in json.loads(path.read_bytes()).items()} if path.is_file() else {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"directory: {path} is damaged ({error})") from error


def _steps_per_epoch(args: Any, state: Any, loader: Any) -> int:
    """As the ``Trainer`` counts them; of a stream without a length all steps are one epoch."""
    try:
        length = len(loader)
    except TypeError:
        return int(state.max_steps)
    return max(1, math.ceil(length / int(args.gradient_accumulation_steps)))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by their names in the model that was given to the ``Trainer``, out of what accelerate wraps it in."""
    return {name: value for name, value in unwrap_model(model).named_parameters() if value.requires_grad}
