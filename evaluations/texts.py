"""Texts of a file as a language model from a local folder reads them, and as a person does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robust_if.checkpoints import Checkpoint
from robust_if.data import Samples
from robust_if.evaluations.baselines import predict
from robust_if.fairness.perturbation import perturb
from robust_if.language import files
from robust_if.language.encoding import encode
from robust_if.language.models import is_adapter, load
from robust_if.sweep import Progress, fingerprint, silent
from robust_if.task import Task, check_state
from robust_if.token_losses import NO_TOKEN, NOT_LEARNT, Kind
from robust_if.writing import plain, write_json


@dataclass(frozen=True)
class Columns:
    """Names of a data set's columns; :func:`robust_if.language.encoding.encode` says which of them are read."""

    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"
    label: str = "label"

    def read(self, path: Path) -> Any:
        """The ``datasets.Dataset`` in a file."""
        return files.read(path, texts=(self.prompt, self.completion, self.text))


@dataclass(frozen=True, eq=False)
class Texts:
    """n texts.

    Args:
        data: the ``datasets.Dataset`` that they are of.
        samples: encoded.
        tokenizer: the model's own.
        columns: names of the columns of ``data``.
        classes: what the classes of a classification are called.
        own: whether completion, or class, is the model's own, and not that of ``data``.
    """

    data: Any
    samples: Samples
    tokenizer: Any
    columns: Columns
    classes: tuple[str, ...] = ()
    own: bool = False

    def shown(self, i: int) -> dict[str, Any]:
        """Sample ``i`` for a person: its ``id``, the ``text`` that is learnt, the ``prompt`` before it, and its ``label`` or ``None``."""
        tokens, labels = (each[0] for each in self.samples.batch(slice(i, i + 1)))
        found = {"id": plain(self.samples.ids[i]), "prompt": "", "text": "", "label": None}
        names, row = self.columns, self.data[i] if len(self.samples) == len(self.data) else {}
        if "input_ids" in row:
            row = {}
        if labels.ndim == 0:
            return found | {"text": row[names.text] if names.text in row else self._decoded(tokens), "label": self.classes[int(labels)]}
        learnt = self._decoded(tokens[labels != NOT_LEARNT])
        if "messages" in row:
            *before, last = row["messages"] if not self.own else [*row["messages"], {"content": learnt}]
            return found | {"prompt": "\n".join(f"{turn['role']}: {turn['content']}" for turn in before) + "\n", "text": last["content"]}
        if names.prompt in row and (self.own or names.completion in row):
            return found | {"prompt": row[names.prompt], "text": learnt if self.own else row[names.completion]}
        if names.text in row:
            return found | {"text": row[names.text]}
        return found | {"prompt": self._decoded(tokens[(labels == NOT_LEARNT) & (tokens != NO_TOKEN)]), "text": learnt}

    def _decoded(self, tokens: torch.Tensor) -> str:
        return str(self.tokenizer.decode(tokens[tokens != NO_TOKEN].tolist(), skip_special_tokens=True))


def repeated(texts: Samples, others: Samples) -> int:
    """How many of the texts are among others, token by token, whatever is learnt of them."""
    known = {tuple(row) for row in _unpadded(others)}
    return sum(tuple(row) in known for row in _unpadded(texts))


def _unpadded(samples: Samples) -> list[list[int]]:
    tokens = samples.batch(slice(None))[0]
    return [row[row != NO_TOKEN].tolist() for row in tokens]


@dataclass(frozen=True)
class Source:
    """A language model in a local folder, and how texts are read for it.

    Args:
        model: the folder; of an adapter or of a whole model.
        base: the folder of an adapter's base model, by default the one that it names; of a whole model the state before its fine-tuning, which
            estimators that train anew start from.
        kind: what the model does.
        columns: of the data.
        max_length: tokens after which a text is cut.
        checkpoints: folder of :class:`robust_if.language.callback.KeepCheckpoints`, over whose states scores are summed.
        device, dtype: where, and in which precision, the model is held; as it was saved and on the CPU by default.
    """

    model: Path
    base: Path | None = None
    kind: Kind = "causal-lm"
    columns: Columns = field(default_factory=Columns)
    max_length: int | None = None
    checkpoints: Path | None = None
    device: str | None = None
    dtype: str | None = None

    def load(self) -> Loaded:
        """Model, tokenizer and checkpoints.

        Raises:
            ValueError: if a folder holds something else, or the parts do not fit each other.
            ImportError: if transformers is not installed.
        """
        if self.device is not None:
            _check_device(self.device)
        held: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        adapter = is_adapter(self.model)
        model, tokenizer = load(self.model, self.kind, base=self.base if adapter else None, **held)
        before = None if adapter or self.base is None else load(self.base, self.kind, **held)[0].state_dict()
        if before is not None:
            check_state(model, before)
        along: list[Checkpoint] = []
        if self.checkpoints is not None:
            from robust_if.language.callback import checkpoints  # it imports transformers

            along = checkpoints(self.checkpoints)
        for each in along:
            check_state(model, each.state)
        return Loaded(self, Task.from_transformers(model, tokenizer, self.kind, start=before), tokenizer, tuple(along))


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for a device
        raise ValueError(f"device: {name!r} cannot be used here ({str(error).splitlines()[0]})") from None


@dataclass(frozen=True, eq=False)
class Loaded:
    """A :class:`Source` that was loaded."""

    source: Source
    task: Task
    tokenizer: Any
    checkpoints: tuple[Checkpoint, ...] = ()

    def mark(self, samples: Samples, *settings: object) -> str:
        """What a run is known by: the model's state and checkpoints, the samples, and the settings."""
        along = [fingerprint(each.state, samples, each.weight) for each in self.checkpoints]
        return fingerprint(self.task.model.state_dict(), samples, along, *settings)

    @property
    def config(self) -> Any:
        """The model's settings, of transformers."""
        return self.task.model.config

    @property
    def longest(self) -> int | None:
        """Tokens that the model has positions for; ``None`` if it has no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    def texts(self, data: Any, name: str) -> Texts:
        """Rows of a ``datasets.Dataset`` encoded.

        Raises:
            ValueError: if a column is missing, a text is longer than the model takes, or a class is unknown to it; the message begins with ``name``.
        """
        source, columns = self.source, self.source.columns
        try:
            numbered = self._numbered(data) if source.kind == "classification" else data
            samples = encode(
                numbered,
                self.tokenizer,
                kind=source.kind,
                max_length=source.max_length,
                **{each.name: getattr(columns, each.name) for each in fields(columns)},
            )
            self.check(samples)
        except ValueError as error:
            raise ValueError(f"{name}: {str(error).removeprefix('data: ')}") from error
        return Texts(data, samples, self.tokenizer, columns, self._classes(data))

    def pairs(self, data: Any, name: str) -> tuple[Samples, Samples]:
        """The texts that mention people by an identity term, and the same texts about others (:func:`robust_if.fairness.perturbation.perturb`).

        Raises:
            ValueError: if the model is no classifier of a column of texts, or no text mentions anybody.
        """
        column = self.source.columns.text
        if self.source.kind != "classification" or column not in data.column_names:
            raise ValueError(f"alike: expected --kind classification and a column of texts, {column!r}; {name} has {data.column_names}")
        changed, which = perturb(data[column][:])
        rows = np.flatnonzero(which)
        others = data.select(rows).remove_columns(column).add_column(column, [changed[i] for i in rows])
        return self.texts(data.select(rows), name).samples, self.texts(others, f"{name}, about other people").samples

    def check(self, samples: Samples) -> None:
        """Raise a ``ValueError`` that names the first sample which is too long for the model, or of a class that it does not have."""
        tokens, labels = samples.batch(slice(None))[:2]
        lengths = (tokens != NO_TOKEN).sum(1)
        if self.longest is not None and int(lengths.max()) > self.longest:
            first = int((lengths > self.longest).nonzero()[0])
            raise ValueError(
                f"the model takes up to {self.longest} tokens, id {samples.ids[first]} has {int(lengths[first])}; "
                f"pass max_length={self.longest} to cut what is longer"
            )
        if labels.ndim == 1 and int(labels.max()) >= self.config.num_labels:
            raise ValueError(f"the model has {self.config.num_labels} classes, numbered from 0, and there is a label {int(labels.max())}")

    def _numbered(self, data: Any) -> Any:
        """The rows with the model's numbers for labels that are words."""
        label, known = self.source.columns.label, self.config.label2id
        values = data[label][:] if label in data.column_names else []
        if not any(isinstance(each, str) for each in values):
            return data
        unknown = [each for each in values if each not in known]
        if unknown:
            raise ValueError(f"{label}: the model knows the classes {list(known)}, got {unknown[0]!r}")
        return data.remove_columns(label).add_column(label, [known[each] for each in values])

    def _classes(self, data: Any) -> tuple[str, ...]:
        """What the classes are called, by the data or by the model; otherwise their numbers."""
        if self.source.kind != "classification":
            return ()
        config, feature = self.config, data.features.get(self.source.columns.label)
        named = [config.id2label[k] for k in range(config.num_labels)]
        unnamed = all(name == f"LABEL_{k}" for k, name in enumerate(named)) and getattr(feature, "dtype", "") != "string"
        names = getattr(feature, "names", None) or ([str(k) for k in range(config.num_labels)] if unnamed else named)
        return (*map(str, names), *map(str, range(len(names), config.num_labels)))

    def predicted(self, data: Any, name: str, train: Texts) -> Texts:
        """Texts under their label, or where they carry none under the class that the model gives them, called as ``train`` calls it."""
        column = self.source.columns.label
        if self.source.kind != "classification" or column in data.column_names:
            return self.texts(data, name)
        bare = self.texts(data.add_column(column, [0] * len(data)), name)
        classes = predict(self.task, bare.samples).argmax(1)
        return replace(bare, samples=bare.samples.with_labels(classes), classes=train.classes, own=True)

    def prompts(self, data: Any, new_tokens: int) -> list[list[int]] | None:
        """The tokens of every prompt of queries that carry no completion, or that end before the assistant's turn; ``None`` of others.

        Raises:
            ValueError: if a prompt has no token, or leaves no room for ``new_tokens``.
        """
        columns, names = self.source.columns, data.column_names
        if self.source.kind == "classification" or "input_ids" in names:
            return None
        if "messages" in names:
            if not getattr(self.tokenizer, "chat_template", None) or any(not turns or turns[-1]["role"] == "assistant" for turns in data["messages"]):
                return None
            texts = [self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in data["messages"]]
        elif columns.prompt in names and columns.completion not in names:
            texts = [str(each) for each in data[columns.prompt]]
        else:
            return None
        made = self.tokenizer(texts, add_special_tokens="messages" not in names, padding=False, truncation=False, verbose=False)["input_ids"]
        found = [each[:-1] if each and each[-1] == self.tokenizer.eos_token_id and "messages" not in names else each for each in made]
        for i, tokens in enumerate(found):
            if not tokens or (self.longest is not None and len(tokens) + new_tokens > self.longest):
                room = "" if self.longest is None else f", and with {new_tokens} new ones at most {self.longest}"
                raise ValueError(f"queries: expected at least one token in every prompt{room}, got {len(tokens)} in row {i}")
        return found

    def completed(self, data: Any, prompts: Sequence[list[int]], new_tokens: int, *, kept: Path | None = None, progress: Progress = silent) -> Texts:
        """Prompts with what the model itself says, the most likely token at a time, and exactly as it says it.

        Args:
            data: the rows that the prompts are of.
            prompts: see :meth:`prompts`.
            new_tokens: of a completion at most.
            kept: file in which completions are kept for a later call.
        """
        if kept is not None and kept.is_file():
            completions: list[list[int]] = json.loads(kept.read_text(encoding="utf-8"))
        else:
            completions = [self._completion(prompt, new_tokens) for prompt in progress(prompts, "generate")]
            if kept is not None:
                write_json(kept, completions)
        longest = max(len(prompt) + len(more) for prompt, more in zip(prompts, completions, strict=True))
        tokens, labels = torch.full((len(prompts), longest), NO_TOKEN), torch.full((len(prompts), longest), NOT_LEARNT)
        for i, (prompt, more) in enumerate(zip(prompts, completions, strict=True)):
            tokens[i, : len(prompt) + len(more)] = torch.tensor([*prompt, *more])
            labels[i, len(prompt) : len(prompt) + len(more)] = torch.tensor(more)
        ids = np.asarray(data["id"][:] if "id" in data.column_names else range(len(data)))
        return Texts(data, Samples((tokens, labels), ids), self.tokenizer, self.source.columns, own=True)

    def _completion(self, prompt: list[int], new_tokens: int) -> list[int]:
        model: Any = self.task.model
        given = torch.tensor([prompt], device=next(model.parameters()).device)
        with torch.no_grad():
            out = model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=new_tokens, do_sample=False, num_beams=1,
                pad_token_id=self.tokenizer.pad_token_id,
            )  # fmt: skip
        found: list[int] = out[0, len(prompt) :].tolist()
        return found
