"""robust_if/layout.py: one form for batches that differ in length."""

import pytest
import torch

from robust_if.layout import laid_out
from robust_if.pieces import Outer, Rows, dense


def pieces(length: int) -> list[tuple[str, list[Outer | Rows]]]:
    """An embedding and two layers of which the second and the third share their inputs, as a transformer's query and key do."""
    drawn = torch.Generator().manual_seed(length)
    a, b, c = (torch.randn(3, length, size, generator=drawn).double() for size in (20, 30, 40))
    index = torch.randint(50, (3, length), generator=drawn)
    return [("table", [Rows(index, a, 50)]), ("query", [Outer(a, b)]), ("key", [Outer(a, c)])]


@pytest.mark.parametrize("length", [1, 2, 4])
def test_shorter_texts_take_the_form_of_the_longest_and_share_what_they_share(length: int) -> None:
    layout, whole = laid_out(pieces(4))
    assert len(whole) == 4  # the index, the shared factor, and one of each layer
    found, parts = laid_out(pieces(length), layout)
    assert found == layout
    for entry, (_, expected) in zip(layout.entries, pieces(length), strict=True):
        assert torch.equal(dense([entry.piece([parts[k] for k in entry.columns])]), dense(expected))


def test_longer_texts_have_another_form() -> None:
    assert laid_out(pieces(5), laid_out(pieces(4))[0])[0] != laid_out(pieces(4))[0]
