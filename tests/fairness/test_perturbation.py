"""fairness/perturbation.py: terms exchanged in texts, and gaps between the pairs, against computations on all pairs at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from torch import Tensor, nn

from cases import relative
from oracles import flat, full_gradient, matrix, sample_gradients
from robust_if import InnerProduct, Samples, Task, Utility
from robust_if.fairness.perturbation import TERMS, PerturbationGap, fair_score, flips, mentions, perturb
from robust_if.models import mlp
from robust_if.sweep import fingerprint
from robust_if.token_losses import NO_TOKEN, NOT_LEARNT

OWN = {"gender": [("he", "she"), ("actor", "actress")], "colour": [("red", "green", "blue", "dark grey")], "none": [("one", "two")]}
WORDS = ["he", "SHE", "Actor", "red", "blue", "Dark Grey", "the", "heather", "@he", "two", ", ", "42"]
KINDS = ("divergence", "squared", "signed")


# Texts


@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join), min_size=1, max_size=6), st.integers(0, 3))
def test_every_term_becomes_another_one_of_its_group_and_nothing_else_changes(texts: list[str], seed: int) -> None:
    texts = [*texts, "he"]
    new, changed = perturb(texts, OWN, seed)
    assert changed.tolist() == [one != other for one, other in zip(texts, new, strict=True)]
    groups = [set(group) for axis in OWN.values() for group in axis]
    for one, other in zip(texts, new, strict=True):
        before, after = (text.replace("Dark Grey", "Dark_Grey").replace("dark grey", "dark_grey").split() for text in (one, other))
        for old, word in zip(before, after, strict=True):
            term, now = (each.lower().replace("_", " ") for each in (old, word))
            (group,) = [group for group in groups if term in group] or [{term}]
            assert now in group and (now != term or len(group) == 1)
            assert (old.isupper(), old.istitle()) == (word.isupper(), word.istitle())


def test_what_becomes_of_a_text_depends_on_no_other() -> None:
    texts = [f"he saw {n} red and blue ones" for n in range(20)]
    whole = perturb(texts, OWN, 1)[0]
    assert whole[::-1] == perturb(texts[::-1], OWN, 1)[0]
    assert whole == [perturb([text], OWN, 1)[0][0] for text in texts]
    assert whole != perturb(texts, OWN, 2)[0]
    assert {text.split()[3] for text in whole} == {"green", "blue", "dark"}
    only = {"colour": OWN["colour"]}
    assert [text.replace("he", "she") for text in perturb(texts, only, 1)[0]] == whole


def test_the_same_term_becomes_the_same_and_different_ones_stay_different() -> None:
    for n in range(20):
        (text,), _ = perturb([f"{n} red Red green blue RED"], OWN)
        _, *now = text.lower().replace("dark grey", "dark-grey").split()
        assert now[0] == now[1] == now[4] and len(set(now)) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HE told him: she's hers.", "SHE told her: he's his."),
        ("@he #he then her heather", "@he #she then his heather"),
        ("Women's", "Men's"),
        ("Mr King", "Mrs Queen"),
        ("boyſ and men", "girls and women"),  # a long s is matched as an s
    ],
)
def test_the_table_of_pairs_that_comes_with_it(text: str, expected: str) -> None:
    assert perturb([text], {"gender": TERMS["gender"]})[0] == [expected]


def test_every_default_term_is_replaced() -> None:
    terms = sorted({term for axis in TERMS.values() for group in axis for term in group})
    assert all(term == term.lower() for term in terms) and len(terms) > 100
    assert perturb([f"the {term}." for term in terms])[1].all()
    held = mentions([f"the {term}." for term in terms])
    assert sum(mask.astype(int) for mask in held.values()).tolist() == [1] * len(terms)


def test_texts_by_axis() -> None:
    held = mentions(["he", "a red car, she said", "heather", "blue"], OWN)
    assert {axis: mask.tolist() for axis, mask in held.items()} == {
        "gender": [True, True, False, False], "colour": [False, True, False, True], "none": [False] * 4
    }  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "terms", "error", "match"),
    [
        ("he", OWN, TypeError, "expected a sequence of texts"),
        ([], OWN, ValueError, "at least one"),
        (["he", 3], OWN, TypeError, "got int at position 1"),
        (["heather", "a man"], OWN, ValueError, "none of the 2 texts holds one of the 10 terms"),
        (["he"], {}, ValueError, "terms: expected groups"),
        (["he"], [("he", "she")], ValueError, "terms: expected groups"),
        (["he"], {"gender": [("he",)]}, ValueError, "gender: expected groups of at least two"),
        (["he"], {"gender": [("he", "He")]}, ValueError, "at least two different terms"),
        (["he"], {"gender": ["he"]}, ValueError, "at least two different terms"),
        (["he"], {"gender": "he she"}, ValueError, "at least two different terms"),
        (["he"], {"gender": [("he", "")]}, ValueError, "at least two different terms"),
    ],
)
def test_texts_and_tables_that_are_refused(texts: Any, terms: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        perturb(texts, terms)


# Gaps


def transformer(kind: str) -> Task:
    pytest.importorskip("transformers")
    from robust_if.language.small import classifier, language_model, tokenizer

    made = tokenizer(["he saw her and she saw him"], vocabulary=280, positions=12)
    shape: dict[str, int] = {"layers": 1, "width": 8, "heads": 2}
    model = classifier(made, 3, **shape) if kind == "classification" else language_model(made, **shape)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(8)
    return Task.from_transformers(model.double(), made, kind, reduction="mean")  # type: ignore[arg-type]


def tokens(n: int, width: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(3, 200, (n, width), generator=draw)
    lengths = torch.randint(2, width + 1, (n, 1), generator=draw)
    return torch.where(torch.arange(width) < lengths, x, NO_TOKEN)


def pairs(what: str, n: int = 11) -> tuple[Task, Samples, Samples]:
    """A model, samples, and their perturbations, of which the last is none."""
    draw = torch.Generator().manual_seed(5)
    y = torch.arange(n) % 3
    if what == "table":
        x = torch.randn(n, 4, generator=draw).double()
        other = x + 4 * torch.randn(n, 4, generator=draw).double() * (torch.arange(n) < n - 1)[:, None]
        model = mlp((4,), 3, width=5).double().eval()
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(2)
        return Task(model), Samples((x, y)), Samples((other, y))
    one, other = tokens(n, 7, 1), tokens(n, 9, 2)
    other[-1], other[-1, :7] = NO_TOKEN, one[-1]
    if what == "causal-lm":
        labels = [torch.where(x == NO_TOKEN, NOT_LEARNT, x) for x in (one, other)]
        return transformer(what), Samples((one, labels[0])), Samples((other, labels[1]))
    return transformer(what), Samples((one, y)), Samples((other, y))


CASES = [(what, kind) for what in ("table", "classification", "causal-lm") for kind in KINDS if (what, kind) != ("causal-lm", "divergence")]


def by_hand(task: Task, original: Samples, perturbed: Samples, kind: str) -> float:
    """Pair by pair, from the outputs and losses of single samples."""
    found = []
    with torch.no_grad():
        for i in range(len(original)):
            batches = [part.batch(slice(i, i + 1)) for part in (original, perturbed)]
            if kind == "divergence":
                p, q = (softmax(task.outputs(task.params(), batch).numpy()[0]) for batch in batches)
                found.append((np.sum(p * np.log(p / q)) + np.sum(q * np.log(q / p))) / 2)
            else:
                before, after = (task.losses(task.params(), batch).item() for batch in batches)
                found.append(after - before if kind == "signed" else (after - before) ** 2)
    return float(np.mean(found))


@pytest.mark.parametrize(("what", "kind"), CASES)
@pytest.mark.parametrize("batch_size", [4, 256])
def test_value_and_gradient_are_those_of_all_pairs_at_once(what: str, kind: Any, batch_size: int) -> None:
    task, original, perturbed = pairs(what)
    params = task.params()
    target = PerturbationGap(original, perturbed, kind=kind, batch_size=batch_size)
    expected = by_hand(task, original, perturbed, kind)
    assert abs(expected) > 1e-3
    assert target.value(task, params).item() == pytest.approx(expected, rel=1e-9)

    def whole(p: dict[str, Tensor]) -> Tensor:
        one, other = (part.batch(slice(None)) for part in (original, perturbed))
        if kind == "divergence":
            a, b = (torch.softmax(task.outputs(p, batch), 1) for batch in (one, other))
            return ((a * (a / b).log()).sum(1) + (b * (b / a).log()).sum(1)).mean() / 2
        rise = task.losses(p, other) - task.losses(p, one)
        return rise.mean() if kind == "signed" else rise.square().mean()

    assert relative(flat(target.gradient(task, params)).numpy(), full_gradient(whole, params)) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_products_with_the_gradient_of_the_gap(kind: Any) -> None:
    task, original, perturbed = pairs("classification")
    train = Samples((tokens(9, 6, 3), torch.arange(9) % 3))
    target = PerturbationGap(original, perturbed, kind=kind)
    scores = InnerProduct().score(task, train, target=target)
    slope = flat(target.gradient(task, task.params())).numpy()
    assert scores.target == f"perturbation_{kind}"
    assert relative(scores.values, -matrix(sample_gradients(task, train)) @ slope / 9) < 1e-9


def test_a_sum_with_the_utility_scores_in_one_pass() -> None:
    task, original, perturbed = pairs("classification")
    train = Samples((tokens(9, 6, 3), torch.arange(9) % 3))
    gap, utility = PerturbationGap(original, perturbed), Utility(original)
    one, other, both = (InnerProduct().score(task, train, target=target).values for target in (gap, utility, gap + 0.5 * utility))
    assert relative(both, one + 0.5 * other) < 1e-9


def test_descending_a_gap_lowers_it_and_exchanging_the_texts_changes_only_the_signed_one() -> None:
    task, original, perturbed = pairs("table")
    for kind in KINDS:
        one, other = PerturbationGap(original, perturbed, kind=kind), PerturbationGap(perturbed, original, kind=kind)
        value = one.value(task, task.params())
        assert other.value(task, task.params()).item() == pytest.approx((-1 if kind == "signed" else 1) * value.item(), rel=1e-9)
        slope = one.gradient(task, task.params())
        moved = {name: param - 1e-3 * slope[name] for name, param in task.params().items()}
        assert one.value(task, moved) < value


def test_a_minibatch_keeps_pairs_together_even_where_they_are_equal() -> None:
    task, original, perturbed = pairs("classification")
    whole = PerturbationGap(original, perturbed, kind="squared")
    parts = [whole.minibatch(1, torch.Generator().manual_seed(seed)) for seed in range(60)]
    single = {}
    for part in parts:
        one, other = part.held_out
        assert one.ids == other.ids == part.data.ids
        single[int(one.ids[0])] = part.value(task, task.params()).item()
    assert single.keys() == set(range(11)) and single[10] == 0
    assert np.mean(list(single.values())) == pytest.approx(whole.value(task, task.params()).item())
    assert whole.minibatch(11, torch.Generator()) is whole
    one, other = whole.minibatch(5, torch.Generator().manual_seed(1)).held_out
    assert len(set(one.ids)) == 5 and np.array_equal(one.ids, other.ids)


def test_held_out_texts_have_one_width_and_kind_and_texts_are_part_of_the_fingerprint() -> None:
    _, original, perturbed = pairs("classification")
    target = PerturbationGap(original, perturbed)
    assert [part.batch(slice(None))[0].shape[1] for part in target.held_out] == [9, 9]
    marks = {fingerprint({}, original, each) for each in (target, PerturbationGap(original, perturbed, kind="squared"))}
    assert len(marks) == 2


def test_training_data_are_refused() -> None:
    task, original, perturbed = pairs("table")
    for train in (original, perturbed):
        with pytest.raises(ValueError, match="are the training data"):
            InnerProduct().score(task, train, target=PerturbationGap(original, perturbed))


# Predictions


@pytest.mark.parametrize("what", ["table", "classification"])
@pytest.mark.parametrize("batch_size", [3, 256])
def test_the_fair_score_is_the_share_of_pairs_whose_class_changes(what: str, batch_size: int) -> None:
    task, original, perturbed = pairs(what, 40)
    with torch.no_grad():
        one, other = (task.outputs(task.params(), part.batch(slice(None))).argmax(1) for part in (original, perturbed))
    expected = (one != other).numpy()
    assert 0 < expected.sum() < 39
    assert np.array_equal(flips(task, original, perturbed, batch_size=batch_size), expected)
    assert fair_score(task, original, perturbed, batch_size=batch_size) == expected.mean()


def test_one_logit_flips_where_its_sign_does() -> None:
    task = Task(nn.Linear(1, 1, bias=False).double().eval(), lambda z, batch: nn.functional.softplus(z[:, 0]))
    x, y = torch.tensor([[-1.0], [2.0], [3.0]]).double(), torch.tensor([0, 1, 0])
    other = torch.tensor([[1.0], [3.0], [-0.5]]).double()
    assert flips(task, (x, y), (other, y)).tolist() == [True, False, True]


# Bad input


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x, y: (x[:-1], y[:-1]), "one sample for each of the 11 original ones, got 10"),
        (lambda x, y: (x, (y + (torch.arange(11) > 8)) % 3), "2 differ, the first of id 9"),
        (lambda x, y: (x[:, :-1], y), "tensors of the form"),
        (lambda x, y: (x, y, y), "tensors of the form"),
        (lambda x, y: (x,), r"expected \(x, y\)"),
    ],
)
def test_pairs_that_are_none(change: Any, match: str) -> None:
    task, original, perturbed = pairs("table")
    other = change(*perturbed.batch(slice(None)))
    for function in (PerturbationGap, lambda *both: fair_score(task, *both)):
        with pytest.raises(ValueError, match=match):
            function(original, other)


def test_pairs_without_a_difference_and_unknown_kinds() -> None:
    _, original, perturbed = pairs("classification")
    wider = Samples((torch.nn.functional.pad(original.batch(slice(None))[0], (0, 3), value=NO_TOKEN), original.labels))
    with pytest.raises(ValueError, match="all 11 samples are equal"):
        PerturbationGap(original, wider)
    with pytest.raises(ValueError, match="kind: expected one of 'divergence', 'squared', 'signed', got 'l1'"):
        PerturbationGap(original, perturbed, kind="l1")  # type: ignore[arg-type]


def test_a_language_model_has_no_divergence_of_classes() -> None:
    task, original, perturbed = pairs("causal-lm")
    with pytest.raises(ValueError, match="take kind='squared' or 'signed'"):
        PerturbationGap(original, perturbed).value(task, task.params())
    with pytest.raises(ValueError, match=r"expected a classifier's logits \(B, K\), got shape"):
        fair_score(task, original, perturbed)
