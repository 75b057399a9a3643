"""What every test shares: one torch thread, and hypothesis that tries the same examples on every run."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=4, database=None)
hypothesis.settings.load_profile("repeatable")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Every test starts at the same global random state, whatever ran before it."""
    torch.manual_seed(0)
