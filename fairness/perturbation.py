"""Whether a model treats a text otherwise when the people in it are others: pairs of a text and its demographic perturbation.

A perturbation replaces every identity term by another of its kind and changes nothing else, so the label stays. What differs between the two
predictions of a pair is unfairness without any group of samples being compared, and needs no sensitive attribute.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that every reader of torch code expects

from robust_if.data import Samples, as_samples, batches
from robust_if.fairness.leaks import same_samples
from robust_if.predictions import class_logits
from robust_if.targets import Functional
from robust_if.task import Batch, Params, Task
from robust_if.token_losses import NO_TOKEN, NOT_LEARNT, is_tokens

#: By axis, groups of terms of which one may stand for another.
Terms = Mapping[str, Sequence[Sequence[str]]]
Mask = NDArray[np.bool_]
Kind = Literal["divergence", "squared", "signed"]

_PAIRS = (
    "he she, his her, him her, hers his, himself herself, man woman, men women, boy girl, boys girls, father mother, fathers mothers, dad mom, "
    "dads moms, son daughter, sons daughters, brother sister, brothers sisters, husband wife, husbands wives, uncle aunt, nephew niece, "
    "grandfather grandmother, grandpa grandma, boyfriend girlfriend, gentleman lady, gentlemen ladies, male female, males females, mr mrs, "
    "king queen, kings queens, prince princess, transgender cisgender, trans cis"
)

#: English terms that are no insults. Where a term stands in several groups, the first counts: "her" is taken for "his", not for "him".
TERMS: Terms = {
    "gender": tuple(tuple(pair.split()) for pair in _PAIRS.split(", ")),
    "religion": (
        ("christian", "muslim", "jewish", "hindu", "buddhist", "sikh", "catholic", "protestant", "atheist"),
        ("jew", "christian", "muslim", "hindu", "buddhist", "sikh", "catholic", "protestant", "atheist"),
        ("christians", "muslims", "jews", "hindus", "buddhists", "sikhs", "catholics", "protestants", "atheists"),
        ("christianity", "islam", "judaism", "hinduism", "buddhism", "sikhism"),
    ),
    "race": (
        ("black", "white", "asian", "hispanic", "latino", "arab"),
        ("blacks", "whites", "asians", "hispanics", "latinos", "arabs"),
        ("african american", "asian american", "european american", "mexican american", "native american"),
    ),
    "origin": (
        ("african", "american", "canadian", "chinese", "european", "indian", "japanese", "korean", "mexican", "middle eastern", "russian"),
        ("africans", "americans", "canadians", "europeans", "indians", "koreans", "mexicans", "russians"),
    ),
    "orientation": (
        ("gay", "lesbian", "bisexual", "homosexual", "heterosexual"),
        ("gays", "lesbians", "bisexuals", "homosexuals", "heterosexuals"),
    ),
    "age": (("young", "middle-aged", "elderly"), ("younger", "older"), ("teenager", "pensioner"), ("teenagers", "pensioners")),
}


def perturb(texts: Sequence[str], terms: Terms = TERMS, seed: int = 0) -> tuple[list[str], Mask]:
    """The texts with every identity term replaced by another of its group, and which texts that changed, ``(n,)``.

    Whole words are replaced, in the case in which they stand (name, NAME, Name); names of accounts (@name) stay. Within a text the same term becomes
    the same term, and different ones stay different, since a text shifts each group by one number, drawn from the seed, the text and the group: what
    becomes of a text depends neither on the others nor on their order. Nothing else changes, so an article may not fit ("a" before "asian"), and
    a word with other senses ("black") is replaced in those as well; a table of your own may leave it out.

    Args:
        texts: n texts.
        terms: by axis, groups of at least two terms of which one may stand for another; of several groups with a term the first counts.
        seed: draws which.

    Raises:
        ValueError: if there is no text, or none holds a term, or the table is malformed.
        TypeError: if a text is not a string.

    Source: demographic perturbation, Qian et al. 2022, "Perturbation Augmentation for Fairer NLP" (arXiv 2205.12586); there a trained model rewrites
    the text, here words of a table are exchanged.
    """
    pattern, places = _table(terms)

    def perturbed(text: str) -> str:
        def other(found: re.Match[str]) -> str:
            _, group, position = places[_key(found[0])]
            digest = hashlib.blake2b(repr((seed, text, group)).encode(errors="surrogatepass"), digest_size=8).digest()
            shift = 1 + int.from_bytes(digest) % (len(group) - 1)
            return _in_case_of(found[0], group[(position + shift) % len(group)])

        return pattern.sub(other, text)

    new = [perturbed(text) for text in _texts(texts)]
    changed = np.array([one != other for one, other in zip(texts, new, strict=True)])
    if not changed.any():
        raise ValueError(
            f"texts: none of the {len(changed)} texts holds one of the {len(places)} terms; pass a table of the terms they use, as terms"
        )
    return new, changed


def mentions(texts: Sequence[str], terms: Terms = TERMS) -> dict[str, Mask]:
    """Which texts hold a term of each axis, ``(n,)`` by axis; arguments and errors are those of :func:`perturb`, but a term need not occur."""
    pattern, places = _table(terms)
    held = [{places[_key(found)][0] for found in pattern.findall(text)} for text in _texts(texts)]
    return {axis: np.array([axis in each for each in held]) for axis in terms}


@dataclass(frozen=True, eq=False)
class PerturbationGap(Functional):
    """How much the model's answers change when the people in a text are others, 0 if they do not; a mean over pairs.

    With the loss ℓ, and the probabilities p of the classes, of the text x and its perturbation x̃:

    * ``"divergence"``: ½ KL(p(x) ‖ p(x̃)) + ½ KL(p(x̃) ‖ p(x)), of classifiers; it looks at no label, like :func:`fair_score`.
    * ``"squared"``: (ℓ(x̃) − ℓ(x))², for every task. Pairs with large losses dominate it.
    * ``"signed"``: ℓ(x̃) − ℓ(x). Gaps of opposite sign cancel, and lowering it below 0 makes the perturbed texts the favoured ones: good only where
      the perturbation has one direction, such as from one group to another.

    Each is a plain mean of one number per pair, so values and gradients are exact under streaming. For language models the loss should be that of
    tokens which both texts share: a completion that holds no term, or ``reduction="mean"`` where the number of tokens differs.

    Args:
        original: n held-out samples, ``(x, y)`` with tokens or features x.
        perturbed: their perturbations in the same order, with the same labels. Pairs that do not differ count as 0, so take only those that do.
        kind: one of those above.

    Raises:
        ValueError: if lengths, labels or forms differ, no pair does, or ``kind`` is unknown.

    Source: the form is our own; the signed gap follows the loss gap of Donini et al. 2018 (arXiv 1802.08626), the pairs Qian et al. 2022 (arXiv
    2205.12586), and the divergence of paired predictions counterfactual logit pairing, Garg et al. 2019 (arXiv 1809.10610).
    """

    data: Samples = field(init=False, repr=False)
    original: Samples = field(repr=False)
    perturbed: Samples = field(repr=False)
    kind: Kind = "divergence"

    is_mean = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {', '.join(map(repr, get_args(Kind)))}, got {self.kind!r}")
        original, perturbed = _pairs(self.original, self.perturbed)
        object.__setattr__(self, "original", original)
        object.__setattr__(self, "perturbed", perturbed)
        object.__setattr__(self, "data", Samples((*original.batch(slice(None)), *perturbed.batch(slice(None))), original.ids))

    @property
    def name(self) -> str:
        return f"perturbation_{self.kind}"

    @property
    def held_out(self) -> tuple[Samples, ...]:
        return (self.original, self.perturbed)

    def check(self, train: Samples) -> None:
        if any(same_samples(part, train) for part in self.held_out):
            raise ValueError(f"target: the texts of {self.name} are the training data; a gap must be measured on samples that nothing was trained on")

    def moments(self, task: Task, params: Params, batch: Batch) -> Tensor:
        half = len(batch) // 2
        original, perturbed = batch[:half], batch[half:]
        if self.kind == "divergence":
            p, q = (_log_probabilities(task.outputs(params, part)) for part in (original, perturbed))
            return ((p.exp() - q.exp()) * (p - q)).sum(1, keepdim=True) / 2
        rise = task.losses(params, perturbed) - task.losses(params, original)
        return (rise if self.kind == "signed" else rise**2)[:, None]

    def reduce(self, means: Tensor) -> Tensor:
        return means[0]

    def minibatch(self, size: int, generator: torch.Generator) -> PerturbationGap:
        """As many whole pairs, drawn at random."""
        if size >= len(self.data):
            return self
        rows, part = torch.randperm(len(self.data), generator=generator)[:size].numpy(), copy(self)
        for name in ("data", "original", "perturbed"):  # not made anew: a few pairs may all be equal
            object.__setattr__(part, name, getattr(self, name).take(rows))
        return part


def flips(task: Task, original: Any, perturbed: Any, *, batch_size: int = 256) -> Mask:
    """Whether the predicted class of each pair changes, ``(n,)``; with :func:`mentions`, by axis.

    Args:
        task: a classifier.
        original: n samples ``(x, y)``.
        perturbed: their perturbations.
        batch_size: how many are evaluated at a time.

    Raises:
        ValueError: if lengths, labels or forms differ, no pair does, or the model is no classifier.
    """
    params = task.params()

    @torch.no_grad()
    def classes(samples: Samples) -> Tensor:
        return torch.cat(
            [_log_probabilities(task.outputs(params, batch)).argmax(1) for batch in batches(samples, batch_size, next(iter(params.values())))]
        )

    one, other = (classes(part) for part in _pairs(original, perturbed))
    return np.asarray((one != other).cpu().numpy())


def fair_score(task: Task, original: Any, perturbed: Any, *, batch_size: int = 256) -> float:
    """FairScore: the share of pairs whose predicted class changes, lower is fairer; arguments and errors are those of :func:`flips`.

    Source: Qian et al. 2022 (arXiv 2205.12586), of the texts that a perturbation changes.
    """
    return float(flips(task, original, perturbed, batch_size=batch_size).mean())


def _log_probabilities(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor) and outputs.ndim > 2:
        raise ValueError(
            f"model: expected a classifier's logits (B, K), got shape {tuple(outputs.shape)}; of a language model take kind='squared' or 'signed'"
        )
    return F.log_softmax(class_logits(outputs), 1)


def _pairs(original: Any, perturbed: Any) -> tuple[Samples, Samples]:
    """Both as tensors, tokens padded to one width, so that they can also be joined."""
    given = as_samples(original), as_samples(perturbed)
    if len(given[0]) != len(given[1]):
        raise ValueError(f"perturbed: expected one sample for each of the {len(given[0])} original ones, got {len(given[1])}")
    one, other = (each.batch(slice(None)) for each in given)
    for name, part in (("original", one), ("perturbed", other)):
        if not isinstance(part, (tuple, list)) or len(part) < 2 or not all(isinstance(each, Tensor) for each in part):
            raise ValueError(f"{name}: expected (x, y) as tensors, got {type(part).__name__}")
    shapes = [[(each.ndim if is_tokens(each) else each.shape, each.dtype) for each in part] for part in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"perturbed: expected tensors of the form of the original ones, {shapes[0]}, got {shapes[1]}")
    if one[1].ndim == 1 and not torch.equal(one[1], other[1]):
        at = torch.nonzero(one[1] != other[1])[:, 0]
        raise ValueError(
            f"perturbed: expected the labels of the original samples, but {len(at)} differ, the first of id {given[0].ids[int(at[0])]}; "
            "a perturbation keeps the label"
        )
    fills = (NO_TOKEN, NOT_LEARNT, *[NO_TOKEN] * (len(one) - 2))
    one, other = zip(*(_one_width(*each) for each in zip(one, other, fills, strict=True)), strict=True)
    if torch.equal(one[0], other[0]):
        raise ValueError(f"perturbed: all {len(given[0])} samples are equal to the original ones, so no text holds a term that was replaced")
    return Samples(one, given[0].ids), Samples(other, given[1].ids)


def _one_width(one: Tensor, other: Tensor, fill: int) -> tuple[Tensor, Tensor]:
    if not is_tokens(one):
        return one, other
    width = max(one.shape[1], other.shape[1])
    return F.pad(one, (0, width - one.shape[1]), value=fill), F.pad(other, (0, width - other.shape[1]), value=fill)


def _texts(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise TypeError(f"texts: expected a sequence of texts, got one text, {texts[:30]!r}")
    if len(texts) == 0:
        raise ValueError("texts: expected at least one, got none")
    if other := [position for position, text in enumerate(texts) if not isinstance(text, str)]:
        raise TypeError(f"texts: expected strings, got {type(texts[other[0]]).__name__} at position {other[0]}")
    return texts


def _table(terms: Terms) -> tuple[re.Pattern[str], dict[str, tuple[str, tuple[str, ...], int]]]:
    """What matches any term, and by term its axis, its group, and its position there."""
    if not isinstance(terms, Mapping) or not terms:
        raise ValueError(f"terms: expected groups of terms by axis, such as {{'gender': [('he', 'she')]}}, got {terms!r}")
    places: dict[str, tuple[str, tuple[str, ...], int]] = {}
    for axis, groups in terms.items():
        for given in [groups] if isinstance(groups, str) else groups:
            group = () if isinstance(given, str) else tuple(given)
            if len(set(map(_key, group))) < max(2, len(group)) or any(term != term.strip() or not term for term in group):
                raise ValueError(f"terms: {axis}: expected groups of at least two different terms, such as ('he', 'she'), got {given!r}")
            for position, term in enumerate(group):
                places.setdefault(_key(term), (axis, group, position))
    spelt = {group[position] for _, group, position in places.values()}
    longest_first = "|".join(re.escape(term) for term in sorted(spelt, key=len, reverse=True))
    return re.compile(rf"(?<![\w@])(?:{longest_first})(?!\w)", re.IGNORECASE), places


def _key(term: str) -> str:
    """The same for all spellings that are matched as one; a letter may have several lower-case forms, but one upper-case form."""
    return term.upper().lower()


def _in_case_of(found: str, new: str) -> str:
    if found.isupper() and len(found) > 1:
        return new.upper()
    return new.title() if found.istitle() else new.capitalize() if found[0].isupper() else new
