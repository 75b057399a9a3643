"""Which training images are behind generated ones: influence on the denoising loss of a diffusion model from a local folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robust_if.data import Samples
from robust_if.estimators import InnerProduct
from robust_if.evaluations.folder import check_holds_none, claim
from robust_if.evaluations.previews import thumbnail
from robust_if.evaluations.tracing import Trace, influences, write
from robust_if.formats.parts import require
from robust_if.gradients import reason
from robust_if.loading import Dataset, read
from robust_if.sweep import Sweep, fingerprint
from robust_if.task import Task
from robust_if.writing import plain


@dataclass(frozen=True, eq=False)
class Images:
    """n images.

    Args:
        data: as they were read.
        samples: pixels from −1 to 1, the scale of diffusers, with their class numbers.
    """

    data: Dataset
    samples: Samples = field(repr=False)
    own = False

    def shown(self, i: int) -> dict[str, Any]:
        """Image ``i`` for a person: its ``id``, its ``label`` and the ``image``."""
        label = plain(self.data.labels[i])
        return {"id": plain(self.samples.ids[i]), "prompt": "", "text": "", "label": label, "image": thumbnail(np.asarray(self.data.features)[i])}


@dataclass(frozen=True)
class Denoiser:
    """A class-conditional or unconditional ``UNet2DModel`` in a local folder.

    Args:
        model: the folder, as ``save_pretrained`` of diffusers writes it; of a pipeline that which holds ``unet`` and ``scheduler``.
        label: column or array of the classes, in the order of whose names the model numbers them.
        device: where the model is held; the CPU by default.
        seed: of the noise.
    """

    model: Path
    label: str | None = None
    device: str | None = None
    seed: int = 0

    def load(self) -> Task:
        """The task.

        Raises:
            ValueError: if the folder holds no such model or no scheduler, or the weights are pickled. Nothing is downloaded.
            ImportError: if diffusers is not installed.
        """
        diffusers = require("diffusers", "a diffusion model", "'robust-if[diffusers]'")
        folder = self.model / "unet" if (self.model / "unet").is_dir() else self.model
        scheduler = self.model / "scheduler" if (self.model / "scheduler").is_dir() else self.model
        for needed, path in (("config.json", folder), ("scheduler_config.json", scheduler)):
            if not (path / needed).is_file():
                raise ValueError(f"model: {path} holds no {needed}; expected a local folder with a UNet2DModel and its scheduler, none is downloaded")
        options = {"local_files_only": True, "use_safetensors": True}
        try:
            model = diffusers.UNet2DModel.from_pretrained(str(folder), low_cpu_mem_usage=False, **options)
            steps = diffusers.DDPMScheduler.from_pretrained(str(scheduler), local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"model: {self.model} cannot be read ({reason(error)})") from error
        return Task.from_diffusers(model.to(self.device or "cpu").eval(), steps, seed=self.seed)

    def images(self, path: Path, name: str, task: Task, classes: np.ndarray[Any, Any] | None = None) -> Images:
        """Images from a file or folder, checked against the model and ``classes``, those of the training data.

        Raises:
            ValueError: if they are no images, or of another size or class than the model's.
        """
        data = read(path, label=self.label)
        if data.kind != "image" or not isinstance(data.features, np.ndarray):
            raise ValueError(f"{name}: expected images, {path} holds a {data.kind}")
        config: Any = task.model.config
        side = config.sample_size
        shape = (config.in_channels, *((side, side) if isinstance(side, int) else side or data.features.shape[2:]))
        if data.features.shape[1:] != shape:
            raise ValueError(f"{name}: the model takes images of shape {shape}, got {data.features.shape[1:]}")
        known = np.unique(data.labels) if classes is None else classes
        unknown = [each for each in np.unique(data.labels).tolist() if each not in known.tolist()]
        if unknown:
            raise ValueError(f"{name}: the class {unknown[0]!r} does not occur in the data, which have {known.tolist()[:20]}")
        if config.num_class_embeds is not None and len(known) > config.num_class_embeds:
            raise ValueError(f"{name}: the model has {config.num_class_embeds} classes, got {len(known)}")
        numbers = torch.from_numpy(np.searchsorted(known, data.labels))
        return Images(data, Samples((torch.from_numpy(data.features) * 2 - 1, numbers), data.ids))


def run(
    source: Denoiser,
    data: Path,
    queries: Path,
    directory: Path,
    *,
    estimator: InnerProduct = InnerProduct(normalise="layer"),  # noqa: B008 - frozen
    top: int = 10,
    sweep: Sweep = Sweep(batch_size=16),  # noqa: B008 - frozen
    command: str = "",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Trace generated images, and write what :func:`robust_if.evaluations.tracing.run` writes; the same call resumes.

    Args:
        data, queries: images that :func:`robust_if.loading.read` reads: the training images, and generated ones with the classes they were asked for.

    Returns:
        The content of ``result.json``.

    Raises:
        ValueError: if something does not fit; before any long work.

    Source: the denoising loss at fixed timesteps as in Kwon et al. 2024 (arXiv 2310.00902), section 4.3.
    """
    if top < 1:
        raise ValueError(f"top: expected at least 1, got {top}")
    check_holds_none(directory, [data, queries, source.model])
    task = source.load()
    estimator.check(task)
    train = source.images(data, "data", task)
    asked = source.images(queries, "queries", task, np.unique(train.data.labels))
    mark = fingerprint(task.model.state_dict(), train.samples, fingerprint({}, asked.samples), estimator, top, source.seed)
    finished = claim(directory, mark, overwrite)
    if finished is not None:
        return finished
    work = directory / "work"
    work.mkdir(exist_ok=True)
    matrix = influences(task, train.samples, asked.samples, estimator=estimator, checkpoints=(), directory=work, sweep=sweep)
    found = Trace(matrix, train, asked, min(top, len(matrix)), estimator.name)
    result = write(found, directory, {
        "data": str(data), "asked": str(queries), "model": str(source.model), "kind": "denoiser", "checkpoints": 0, "warnings": [],
        "command": command,
    })  # fmt: skip
    shutil.rmtree(work, ignore_errors=True)
    return result
