"""Three tasks for language models, of ten kinds of prompts each: which training samples taught the model a kind is then known.

All sentences are put together from short lists of words, which all kinds share, so that no kind is told by its nouns; answers are computed. The form
follows the data of DataInf: an instruction with a sentence, or a short word problem with the answer alone or after the working; 90 training and 10
query prompts of each kind.

Source: Kwon et al. 2024, "DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and Diffusion Models" (arXiv 2310.00902), section 4.3,
for the protocol; the prompts are our own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd

PromptTask = Literal["sentences", "maths", "maths-reasoning"]

#: Prompts of each kind to train on, and to ask with.
TRAIN, QUERIES = 90, 10
#: Ways in which a kind can be worded.
WORDINGS = 3

NAMES = [
    "Ada", "Bruno", "Carla", "David", "Edith", "Felix", "Greta", "Hanna", "Ivan", "Julia", "Karim", "Leila", "Mateo", "Nadia", "Oscar", "Petra",
    "Quentin", "Rosa", "Samir", "Tessa", "Ugo", "Vera", "Walter", "Yusuf",
]  # fmt: skip
THINGS = [
    "apples", "books", "candles", "coins", "cups", "flowers", "hats", "keys", "lamps", "lemons", "marbles", "nuts", "pencils", "plates",
    "ribbons", "shells", "spoons", "stamps", "stones", "toys",
]  # fmt: skip
VERBS = [
    "bought", "broke", "carried", "cleaned", "counted", "dropped", "found", "hid", "kept", "lost", "moved", "packed", "painted", "sold", "wanted",
    "washed",
]  # fmt: skip
ADJECTIVES = [
    "big", "black", "blue", "bright", "cheap", "clean", "dark", "empty", "fine", "green", "heavy", "little", "new", "old", "red", "round",
    "small", "white",
]  # fmt: skip
PLACES = [
    "at home", "at school", "at work", "by the lake", "by the road", "in the garden", "in the house", "in the park", "on the hill",
    "on the train", "under the bridge",
]  # fmt: skip
TIMES = ["again", "early", "last week", "later", "today", "together", "twice", "yesterday", ""]

Words = list[str]
Numbers = tuple[int, ...]
#: One step of a calculation: two numbers and what is done with them.
Step = tuple[int, str, int]

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass(frozen=True)
class Transformation:
    """What is asked of a sentence, in three wordings, and what becomes of its words."""

    wordings: tuple[str, str, str]
    answer: Callable[[Words], str]


@dataclass(frozen=True)
class Problem:
    """A word problem in three wordings, of the numbers that it tells, and the steps to its answer.

    Args:
        wordings: with ``{a}``, ``{b}``, ``{c}`` for the numbers, ``{who}`` and ``{other}`` for names, and ``{things}``.
        numbers: those told, from three that are drawn: x from 3 to 30, y and z from 2 to 9.
        steps: from those told; the value of the last is the answer.
    """

    wordings: tuple[str, str, str]
    numbers: Callable[[int, int, int], Numbers]
    steps: Callable[..., list[Step]]


TRANSFORMATIONS = {
    "reversed": Transformation(
        ("Write the words in reverse order.", "Say it backwards, word by word.", "Begin with the last word and end with the first."),
        lambda words: " ".join(reversed(words)),
    ),
    "capitals": Transformation(
        ("Write the sentence in capital letters.", "Put everything in upper case.", "Turn every small letter into a large one."),
        lambda words: " ".join(words).upper(),
    ),
    "no-vowels": Transformation(
        ("Remove all vowels.", "Leave out a, e, i, o and u.", "Keep only the consonants of every word."),
        lambda words: " ".join("".join(letter for letter in word if letter.lower() not in "aeiou") for word in words),
    ),
    "initials": Transformation(
        ("Give the first letter of every word.", "Which letters do the words begin with?", "Shorten each word to its initial."),
        lambda words: " ".join(word[0] for word in words),
    ),
    "count": Transformation(
        ("How many words are there?", "Count the words of the sentence.", "Say the number of words."),
        lambda words: str(len(words)),
    ),
    "pig-latin": Transformation(
        ("Move each first letter to the end and add ay.", "Say it in pig latin.", "Put the initial of each word last, followed by ay."),
        lambda words: " ".join(f"{word[1:]}{word[0]}ay" for word in words),
    ),
    "every-second": Transformation(
        ("Write every second word, beginning with the first.", "Skip every other word.", "Keep words one, three, five and so on."),
        lambda words: " ".join(words[::2]),
    ),
    "sorted": Transformation(
        ("Sort the words by the alphabet.", "Put the words in alphabetical order.", "Arrange the words as in a dictionary."),
        lambda words: " ".join(sorted(words, key=str.lower)),
    ),
    "lengths": Transformation(
        ("Give the number of letters of every word.", "How long is each word?", "Replace each word by its length."),
        lambda words: " ".join(str(len(word)) for word in words),
    ),
    "swapped": Transformation(
        ("Swap the first and the last word.", "Exchange the two words at the ends.", "Let the outermost words change places."),
        lambda words: " ".join([words[-1], *words[1:-1], words[0]]),
    ),
}

PROBLEMS = {
    "total": Problem(
        (
            "{who} has {a} {things} and finds {b} more. How many {things} does {who} have now?",
            "There are {a} {things} on the table. {who} adds {b}. How many {things} are on the table?",
            "{a} {things} belong to {who} and {b} to {other}. How many {things} is that in all?",
        ),
        lambda x, y, z: (x, y + z),
        lambda a, b: [(a, "+", b)],
    ),
    "left": Problem(
        (
            "{who} has {a} {things} and gives {b} of them to {other}. How many {things} are left?",
            "Of {a} {things}, {who} loses {b}. How many {things} remain?",
            "{who} had {a} {things}, but {b} were stolen. How many {things} does {who} still have?",
        ),
        lambda x, y, z: (x + y, y),
        lambda a, b: [(a, "-", b)],
    ),
    "groups": Problem(
        (
            "{who} has {a} boxes with {b} {things} in each. How many {things} does {who} have?",
            "{who} fills {a} bags and puts {b} {things} in every bag. How many {things} are in the bags?",
            "On each of {a} shelves {who} places {b} {things}. How many {things} are on the shelves?",
        ),
        lambda x, y, z: (y, z),
        lambda a, b: [(a, "*", b)],
    ),
    "share": Problem(
        (
            "{who} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
            "{a} {things} are divided into {b} equal parts by {who}. How many {things} are in one part?",
            "{who} splits {a} {things} evenly between {b} children. How many {things} are there per child?",
        ),
        lambda x, y, z: (y * z, y),
        lambda a, b: [(a, "/", b)],
    ),
    "change": Problem(
        (
            "{who} buys {a} {things} for {b} euros each and pays with {c} euros. How many euros does {who} get back?",
            "{a} {things} cost {b} euros apiece. {who} hands over {c} euros. What is the change?",
            "{who} takes {a} {things} at {b} euros each. Of {c} euros, how much money does {who} keep?",
        ),
        lambda x, y, z: (y, z, y * z + x),
        lambda a, b, c: [(a, "*", b), (c, "-", a * b)],
    ),
    "exchange": Problem(
        (
            "{who} has {a} {things}, sells {b} and then buys {c}. How many {things} does {who} have at the end?",
            "{b} of the {a} {things} break, and {who} replaces them by {c} new ones. How many {things} are whole?",
            "From {a} {things} {who} throws {b} away and receives {c} from {other}. How many {things} is that now?",
        ),
        lambda x, y, z: (x + y, y, z),
        lambda a, b, c: [(a, "-", b), (a - b, "+", c)],
    ),
    "together": Problem(
        (
            "{who} has {a} {things}. {other} has {b} more than {who}. How many {things} do they have together?",
            "{who} owns {a} {things} and {other} owns {b} more than that. How many {things} do both own?",
            "With {a} {things}, {who} has {b} fewer than {other}. What is the sum of their {things}?",
        ),
        lambda x, y, z: (x, y),
        lambda a, b: [(a, "+", b), (a, "+", a + b)],
    ),
    "weeks": Problem(
        (
            "{who} makes {a} {things} every day. How many {things} does {who} make in {b} weeks?",
            "Each day {who} sells {a} {things}. How many {things} are sold within {b} weeks?",
            "{who} needs {a} {things} a day. How many {things} will last for {b} weeks?",
        ),
        lambda x, y, z: (y, z),
        lambda a, b: [(b, "*", 7), (b * 7, "*", a)],
    ),
    "border": Problem(
        (
            "Around a field {who} lays {a} {things} on each long side and {b} on each short side. How many {things} lie around it?",
            "{who} frames a square table: {a} {things} on the left and right, {b} at the top and bottom. How many {things} frame it?",
            "A garden has two sides of {a} {things} and two of {b}. How many {things} does {who} count on a walk around it?",
        ),
        lambda x, y, z: (x + y, z),
        lambda a, b: [(a, "+", b), (2, "*", a + b)],
    ),
    "average": Problem(
        (
            "{who} finds {a}, {b} and {c} {things} on three days. How many {things} is that per day on average?",
            "On three days {who} sells {a}, {b} and {c} {things}. What is the mean number of {things}?",
            "Three friends of {who} have {a}, {b} and {c} {things}. How many {things} would each have if all had the same?",
        ),
        lambda x, y, z: (x + y, x + z, x + 2 * (y + z)),
        lambda a, b, c: [(a, "+", b), (a + b, "+", c), (a + b + c, "/", 3)],
    ),
}


def prompts(task: PromptTask, seed: int = 0, *, wordings: int = 1) -> pd.DataFrame:
    """Prompts with their answers: 90 to train on and 10 to ask with, of each of ten kinds, no prompt twice.

    Args:
        task: ``"sentences"``, ten things to do with a sentence; ``"maths"``, ten kinds of word problems, the answer alone; or ``"maths-reasoning"``,
            the same problems with the working before the answer.
        seed: draws all that varies. The two tasks of maths have the same problems for the same seed.
        wordings: in how many ways a kind is worded, 1 to 3. With 1, as in DataInf, samples of a kind share most words, and word overlap finds
            them; with more, a wording is drawn for every prompt.

    Returns:
        1,000 rows with the columns ``prompt``, ``completion`` (begins with a space), ``kind`` (its name) and ``split`` (``"train"`` or ``"query"``);
        kind by kind, the training prompts first.

    Raises:
        ValueError: for an unknown task, or a number of wordings out of range.
    """
    if task not in get_args(PromptTask):
        raise ValueError(f"task: expected one of {', '.join(map(repr, get_args(PromptTask)))}, got {task!r}")
    if not 1 <= wordings <= WORDINGS:
        raise ValueError(f"wordings: expected 1 to {WORDINGS}, got {wordings}")
    rng = np.random.default_rng([seed, task == "sentences"])
    rows = []
    for kind in TRANSFORMATIONS if task == "sentences" else PROBLEMS:
        drawn: dict[str, str] = {}
        while len(drawn) < TRAIN + QUERIES:
            wording = int(rng.integers(wordings))
            prompt, completion = _transformation(rng, kind, wording) if task == "sentences" else _problem(rng, kind, wording, task)
            drawn.setdefault(prompt, completion)
        rows += [(prompt, completion, kind, "train" if i < TRAIN else "query") for i, (prompt, completion) in enumerate(drawn.items())]
    return pd.DataFrame(rows, columns=["prompt", "completion", "kind", "split"])


def _transformation(rng: np.random.Generator, kind: str, wording: int) -> tuple[str, str]:
    parts = (NAMES, VERBS, ["the", "some", "many", ""], ADJECTIVES, THINGS, PLACES, TIMES)
    words = " ".join(_one(rng, each) for each in parts).split()
    sought = TRANSFORMATIONS[kind]
    return f"{sought.wordings[wording]} Sentence: {' '.join(words)}. Answer:", f" {sought.answer(words)}"


def _problem(rng: np.random.Generator, kind: str, wording: int, task: PromptTask) -> tuple[str, str]:
    who, other = rng.choice(NAMES, 2, replace=False)
    problem = PROBLEMS[kind]
    numbers = problem.numbers(int(rng.integers(3, 31)), int(rng.integers(2, 10)), int(rng.integers(2, 10)))
    told = dict(zip("abc", numbers, strict=False))
    text = problem.wordings[wording].format(who=who, other=other, things=_one(rng, THINGS), **told)
    values = [(step, OPERATIONS[step[1]](step[0], step[2])) for step in problem.steps(*numbers)]
    working = "".join(f" {a} {sign} {b} = {value}." for (a, sign, b), value in values) if task == "maths-reasoning" else ""
    return f"{text} Answer:", f"{working} {values[-1][1]}"


def _one(rng: np.random.Generator, words: Words) -> str:
    return words[int(rng.integers(len(words)))]
