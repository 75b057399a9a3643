"""evaluations/prompts.py: three tasks of ten kinds, whose answers are worked out here a second time from the text of the prompt alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, get_args

import pandas as pd
import pytest

from robust_if.evaluations.prompts import NAMES, OPERATIONS, PROBLEMS, THINGS, TRANSFORMATIONS, PromptTask, prompts

TASKS = get_args(PromptTask)

#: From the sentence to the answer, written otherwise than in the module.
SENTENCES: dict[str, Callable[[str], str]] = {
    "reversed": lambda s: " ".join(s.split()[::-1]),
    "capitals": str.upper,
    "no-vowels": lambda s: re.sub("[aeiouAEIOU]", "", s),
    "initials": lambda s: " ".join(re.findall(r"\b\w", s)),
    "count": lambda s: str(s.count(" ") + 1),
    "pig-latin": lambda s: re.sub(r"(\w)(\w*)", r"\2\1ay", s),
    "every-second": lambda s: " ".join(word for i, word in enumerate(s.split()) if i % 2 == 0),
    "sorted": lambda s: " ".join(sorted(s.split(), key=str.casefold)),
    "lengths": lambda s: re.sub(r"\w+", lambda found: str(len(found[0])), s),
    "swapped": lambda s: re.sub(r"^(\w+) (.*) (\w+)$", r"\3 \2 \1", s),
}
#: From the numbers in the text, in their order there, to the answer; "exchange" has a wording that tells the second first.
MATHS: dict[str, Callable[..., float]] = {
    "total": lambda a, b: a + b,
    "left": lambda a, b: a - b,
    "groups": lambda a, b: a * b,
    "share": lambda a, b: a / b,
    "change": lambda a, b, c: c - a * b,
    "exchange": lambda a, b, c: max(a, b) - min(a, b) + c,
    "together": lambda a, b: 2 * a + b,
    "weeks": lambda a, b: 7 * a * b,
    "border": lambda a, b: 2 * a + 2 * b,
    "average": lambda a, b, c: (a + b + c) / 3,
}


@cache
def table(task: Any, seed: int = 0, wordings: int = 1) -> pd.DataFrame:
    return prompts(task, seed, wordings=wordings)


def numbers(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", text)]


@pytest.mark.parametrize("wordings", [1, 3])
@pytest.mark.parametrize("task", TASKS)
def test_ninety_to_train_on_and_ten_to_ask_with_of_each_of_ten_kinds(task: str, wordings: int) -> None:
    frame = table(task, 0, wordings)
    assert list(frame.columns) == ["prompt", "completion", "kind", "split"]
    counts = frame.groupby(["kind", "split"], sort=False).size()
    assert len(counts) == 20
    assert set(counts.xs("train", level="split")) == {90} and set(counts.xs("query", level="split")) == {10}
    assert not frame["prompt"].duplicated().any()
    assert frame["completion"].str.startswith(" ").all() and frame["prompt"].str.endswith("Answer:").all()


@pytest.mark.parametrize("wordings", [1, 3])
def test_sentences_are_answered_right(wordings: int) -> None:
    for row in table("sentences", 0, wordings).itertuples():
        sentence = re.search(r"Sentence: (.*)\. Answer:", str(row.prompt))
        assert sentence is not None
        assert row.completion == " " + SENTENCES[str(row.kind)](sentence[1])


@pytest.mark.parametrize("wordings", [1, 3])
def test_problems_are_answered_right(wordings: int) -> None:
    for row in table("maths", 3, wordings).itertuples():
        assert numbers(str(row.completion)) == [MATHS[str(row.kind)](*numbers(str(row.prompt)))], row.prompt


def test_answers_are_natural_numbers_and_numbers_told_are_positive() -> None:
    frame = table("maths", 0, 3)
    assert frame["completion"].str.fullmatch(r" \d+").all()
    assert min(min(numbers(text)) for text in frame["prompt"]) >= 1


def test_every_step_of_the_working_holds_and_leads_to_the_answer() -> None:
    alone, reasoned = table("maths", 0, 3), table("maths-reasoning", 0, 3)
    assert alone[["prompt", "kind", "split"]].equals(reasoned[["prompt", "kind", "split"]])
    for short, text in zip(alone["completion"], reasoned["completion"], strict=True):
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", text)
        assert steps and all(OPERATIONS[sign](int(a), int(b)) == int(c) for a, sign, b, c in steps)
        assert text.split(".")[-1] == short and int(steps[-1][3]) == int(short)


@pytest.mark.parametrize("task", TASKS)
def test_no_kind_is_told_by_its_names_or_things(task: str) -> None:
    frame = table(task)
    for words in (NAMES, THINGS):
        for _, some in frame.groupby("kind"):
            seen = {word for word in words if some["prompt"].str.contains(rf"\b{word}\b").any()}
            assert len(seen) >= len(words) - 1


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_draws_the_same_again_and_another_draws_others(task: Any) -> None:
    assert table(task).equals(prompts(task))
    assert len(set(table(task)["prompt"]) & set(table(task, 1)["prompt"])) < 150


def test_wordings_of_a_kind_differ_and_all_are_used() -> None:
    for kinds in (TRANSFORMATIONS, PROBLEMS):
        assert all(len(set(each.wordings)) == 3 for each in kinds.values())
    found = table("sentences", 0, 3)
    assert all(found["prompt"].str.startswith(text).any() for each in TRANSFORMATIONS.values() for text in each.wordings)


def test_unknown_tasks_and_wordings_are_refused() -> None:
    with pytest.raises(ValueError, match="task: expected one of 'sentences', 'maths', 'maths-reasoning', got 'math'"):
        prompts("math")  # type: ignore[arg-type]
    for wordings in (0, 4):
        with pytest.raises(ValueError, match=f"wordings: expected 1 to 3, got {wordings}"):
            prompts("maths", wordings=wordings)
