"""data.py: samples in a fixed order, with ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from cases import Rows, case
from robust_if import Samples, as_samples
from robust_if.data import concatenate

X, Y = torch.arange(8.0).view(4, 2), torch.tensor([0, 1, 1, 0])


class Pairs(Rows):
    def __getitem__(self, i: int) -> Any:
        return self.x[i], self.y[i]


FORMS = {"tuple": (X, Y), "arrays": (X.numpy(), Y.tolist()), "tensors": TensorDataset(X, Y), "data set": Pairs(X, Y), "samples": Samples((X, Y))}
EVERY = pytest.mark.parametrize("data", FORMS.values(), ids=FORMS)


@EVERY
def test_all_forms_of_data_are_the_same_samples(data: Any) -> None:
    samples = as_samples(data)
    x, y = samples.batch(slice(1, 3))
    assert len(samples) == 4 and samples.ids.tolist() == [0, 1, 2, 3]
    assert x.tolist() == [[2, 3], [4, 5]] and y.tolist() == [1, 1] and samples.labels.tolist() == [0, 1, 1, 0]


@EVERY
def test_a_selection_keeps_order_and_ids_and_may_be_selected_again(data: Any) -> None:
    samples = as_samples(data)
    twice = samples.take([3, 0, 2]).take(np.array([True, False, True]))
    assert twice.ids.tolist() == [3, 2] and twice.batch(slice(None))[0].tolist() == [[6, 7], [4, 5]] and twice.labels.tolist() == [0, 1]


@EVERY
def test_other_labels_change_nothing_else(data: Any) -> None:
    samples = as_samples(data).take([3, 0, 2])
    other = samples.with_labels([7, 8, 9])
    assert other.labels.tolist() == [7, 8, 9] and other.ids.tolist() == [3, 0, 2] and samples.labels.tolist() == [0, 0, 1]
    assert other.batch(slice(None))[0].tolist() == samples.batch(slice(None))[0].tolist()
    assert other.take([2]).labels.tolist() == [9]
    with pytest.raises(ValueError, match=r"labels: expected shape \(3,\), got \(2,\)"):
        samples.with_labels([1, 2])


def test_batches_of_dictionaries_stay_dictionaries() -> None:
    assert set(case("regression").train.batch(slice(0, 2))) == {"features", "goal"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_samples(([], [])), "data: expected at least one sample, got none"),
        (lambda: as_samples(Rows(X[:0], Y[:0])), "data: expected at least one sample, got none"),
        (lambda: Samples((X, Y)).take([]), "data: expected at least one sample, got none"),
        (lambda: as_samples((X, Y[:3])), r"data: expected tensors of one length, got \[4, 3\]"),
        (lambda: Samples((X, Y), ids=np.array(["a", "b", "b", "b"])), "ids: expected unique ids, but .*'b'.* occurs 3 times"),
        (lambda: Samples((X, Y), ids=np.arange(3)), r"ids: expected one per sample \(4\), got 3"),
        (lambda: Samples((X,)).labels, r"data: expected \(x, y\), got samples without labels"),
    ],
)
def test_data_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_named_by_id(bad: float) -> None:
    broken = X.clone()
    broken[1, 0] = broken[3, 1] = bad
    with pytest.raises(ValueError, match=r"tensor 0 holds values that are not finite \(NaN or infinity\) in 2 of 4 samples, ids b, d; fill or drop"):
        Samples((broken, Y), ids=np.array(["a", "b", "c", "d"]))


@pytest.mark.parametrize("data", ["data.csv", {"x": X}, X, 3])
def test_data_of_another_type_are_refused(data: Any) -> None:
    with pytest.raises(TypeError, match=r"data: expected Samples, \(X, y\) or a map-style torch data set, got"):
        as_samples(data)


def test_columns_of_python_objects_are_refused() -> None:
    with pytest.raises(TypeError, match="data: expected numeric arrays, got one of Python objects; encode text and categories first"):
        as_samples((np.array([["a", 1]], dtype=object), [0]))


def test_texts_of_several_widths_are_joined_with_nothing_after_the_shorter() -> None:
    one = Samples((torch.tensor([[3, 4, 5]]), torch.tensor([[-100, 4, 5]])))
    other = Samples((torch.tensor([[6, -1], [7, 8]]), torch.tensor([[6, -100], [7, 8]])))
    tokens, labels = concatenate([one, other]).batch(slice(None))
    assert tokens.tolist() == [[3, 4, 5], [6, -1, -1], [7, 8, -1]] and labels.tolist() == [[-100, 4, 5], [6, -100, -100], [7, 8, -100]]
    classes = concatenate([Samples((part.batch(slice(None))[0], torch.arange(len(part)))) for part in (one, other)])
    assert classes.labels.tolist() == [0, 0, 1]
