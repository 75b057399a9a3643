"""scoring.py: one call for every estimator."""

from __future__ import annotations

from pathlib import Path

import pytest

import robust_if as rif
from cases import Gap, case, relative


def test_score_is_the_inner_product_by_default_and_any_estimator_by_name() -> None:
    c = case("mlp")
    target = rif.Utility(c.valid)
    assert relative(rif.score(c.task, c.train, target=target).values, rif.InnerProduct().score(c.task, c.train, target=target).values) == 0
    named = rif.score(c.task, c.train, target=target, estimator="datainf")
    assert relative(named.values, rif.InnerProduct(rif.DataInf()).score(c.task, c.train, target=target).values) == 0
    assert rif.score(c.task, c.train, estimator=rif.Loss()).name == "loss"


def test_several_targets_and_the_options_of_a_sweep(tmp_path: Path) -> None:
    c = case("mlp")
    targets = [rif.Utility(c.valid), Gap(c.valid)]
    first, second = rif.score(c.task, c.train, target=targets, batch_size=3, directory=tmp_path)
    assert (first.target, second.target) == ("utility", "gap")
    assert list(tmp_path.rglob("*.parquet"))


def test_an_index_may_be_a_folder(tmp_path: Path) -> None:
    c = case("mlp")
    rif.Store.build(c.task, c.train, tmp_path / "index")
    target = rif.Utility(c.valid)
    got = rif.score(c.task, c.train, target=target, index=tmp_path / "index")
    assert relative(got.values, rif.score(c.task, c.train, target=target).values) <= 1e-10


def test_an_unknown_name_is_refused_and_the_known_ones_are_named() -> None:
    c = case("mlp")
    with pytest.raises(ValueError, match=r"estimator: expected one of label-odds, .*ekfac.*, got 'magic'"):
        rif.score(c.task, c.train, target=rif.Utility(c.valid), estimator="magic")


@pytest.mark.parametrize("estimator", ["ip", "ekfac", "datainf", "self-influence"])
def test_a_memory_limit_holds_for_every_pass(estimator: str) -> None:
    c = case("cnn")
    target = rif.Utility(c.valid)
    with pytest.raises(ValueError, match="max_memory: one sample needs"):
        rif.score(c.task, c.train, target=target, estimator=estimator, max_memory=100)
    loose, tight = (rif.score(c.task, c.train, target=target, estimator=estimator, max_memory=limit) for limit in ("1GB", "100kB"))
    assert relative(tight.values, loose.values) <= 1e-10
