"""Meta-estimators as scikit-learn wants them: its own checks, what the fitted attributes promise, any model inside, and bad input."""

# ruff: noqa: N803, N806 - X is scikit-learn's name
from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn import config_context
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from robust_if.estimators import InnerProduct
from robust_if.fairness.sklearn import InfluenceRelabel, InfluenceReweigh, InfluenceScorer, InfluenceTrim
from robust_if.fairness.tables import TableEncoder
from robust_if.preconditioners import Exact

pytestmark = pytest.mark.filterwarnings("ignore:.* cannot be met:UserWarning")
REPAIRS = (InfluenceReweigh, InfluenceTrim, InfluenceRelabel)
UNEQUAL = "a row given twice is two rows, either of which may be held out for validation; a row of weight two is one"


def _expected(estimator):
    return {"check_sample_weight_equivalence_on_dense_data": UNEQUAL} if not isinstance(estimator, InfluenceScorer) else {}


@parametrize_with_checks(
    [
        InfluenceReweigh(target="utility", rounds=1),
        InfluenceTrim(DecisionTreeClassifier(), target="utility", rounds=1),
        InfluenceRelabel(target="utility", rounds=1),
        InfluenceScorer(target="utility"),
    ],
    expected_failed_checks=_expected,
)
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def data():
    """A table with a category, a missing number, and labels that favour one group."""
    rng = np.random.default_rng(0)
    n = 600
    sex, job = rng.choice(["f", "m"], n), rng.choice(["a", "b", "c"], n)
    skill = rng.normal(size=n)
    y = np.where(skill + 1.2 * (sex == "m") + 0.5 * (job == "a") + 0.5 * rng.normal(size=n) > 0.8, "yes", "no")
    frame = pd.DataFrame({"skill": skill, "hint": (sex == "m") + 0.3 * rng.normal(size=n), "job": job})
    frame.loc[::50, "skill"] = np.nan
    return frame, y, pd.Series(sex, name="sex")


def _gap(model, X, s):
    chosen = model.predict(X) == "yes"
    return abs(chosen[s == "m"].mean() - chosen[s == "f"].mean())


@pytest.mark.parametrize("repair", REPAIRS)
def test_gap_falls_and_attributes_say_how(repair, data):
    X, y, s = data
    model = repair(bound=0.02).fit(X, y, sensitive_features=s)
    held = model.validation_
    before = make_pipeline(TableEncoder(), LogisticRegression()).fit(X[~held], y[~held])
    assert _gap(before, X[held], s[held]) > 0.25 > 0.03 > _gap(model, X[held], s[held])
    assert held.mean() == pytest.approx(0.5, abs=0.01)
    for each in (s == "m", y == "yes", (s == "m") & (y == "yes")):
        assert held[each].mean() == pytest.approx(0.5, abs=0.02)
    assert not model.sample_weight_[held].any() and not model.kept_[held].any() and (model.labels_[held] == y[held]).all()
    assert (model.kept_ == (model.sample_weight_ > 0)).all()
    values = set(np.unique(model.sample_weight_[~held]).tolist())
    if repair is InfluenceReweigh:
        assert values - {0.0, 1.0} and max(values) <= 2
    else:
        assert values == ({0.0, 1.0} if repair is InfluenceTrim else {1.0})
    assert (model.labels_ != y).any() == (repair is InfluenceRelabel)
    hard = model.repair_.best.hard["demographic_parity"]
    assert abs(hard) == pytest.approx(_gap(model, X[held], s[held])) and not model.repair_.unmet
    # the default estimator is a logistic regression of the rows as the attributes describe them
    again = make_pipeline(TableEncoder(), LogisticRegression(tol=1e-8, solver="newton-cholesky"))
    again.fit(X[~held], model.labels_[~held], logisticregression__sample_weight=model.sample_weight_[~held])
    np.testing.assert_allclose(model.predict_proba(X), again.predict_proba(X), atol=1e-6)
    assert model.score(X, y) == (model.predict(X) == y).mean() > 0.7
    assert model.classes_.tolist() == ["no", "yes"] and model.feature_names_in_.tolist() == ["skill", "hint", "job"] and model.n_features_in_ == 3


def test_same_result_twice_from_a_clone_and_after_pickling(data):
    X, y, s = data
    first = InfluenceTrim(RandomForestClassifier(5), rounds=2).fit(X[["hint"]], y, sensitive_features=s)
    for other in (clone(first).fit(X[["hint"]], y, sensitive_features=s), pickle.loads(pickle.dumps(first))):
        np.testing.assert_array_equal(other.sample_weight_, first.sample_weight_)
        np.testing.assert_array_equal(other.predict_proba(X[["hint"]]), first.predict_proba(X[["hint"]]))
        assert other.repair_.best.hard == first.repair_.best.hard
    other = clone(first).set_params(random_state=1).fit(X[["hint"]], y, sensitive_features=s)
    assert (other.validation_ != first.validation_).any()


def test_any_container_and_any_labels_give_the_same(data):
    X, y, s = data
    X = X[["skill", "hint"]].fillna(0)
    model = InfluenceTrim(rounds=3).fit(X, y, sensitive_features=s)
    for other in (X.to_numpy(), X.to_numpy().tolist()):
        assert (clone(model).fit(other, y, sensitive_features=s.tolist()).kept_ == model.kept_).all()
    for labels, positive in ((np.where(y == "yes", 1, 2), 1), (y == "yes", None), (pd.Series(np.where(y == "yes", 0, 1)), 0)):
        found = clone(model).set_params(positive=positive).fit(X, labels, sensitive_features=s)
        assert (found.kept_ == model.kept_).all()
        yes = found.classes_[1] if positive is None else positive
        assert ((found.predict(X) == yes) == (model.predict(X) == "yes")).all()


def test_polars(data):
    pl = pytest.importorskip("polars")
    X, y, s = data
    X = X.fillna({"skill": 0.0})
    model = InfluenceTrim(rounds=2).fit(X, y, sensitive_features=s)
    frame = pl.from_pandas(X)
    other = clone(model).fit(frame, pl.Series(y), sensitive_features=pl.DataFrame({"sex": s.to_numpy()}))
    np.testing.assert_array_equal(other.kept_, model.kept_)
    np.testing.assert_allclose(other.predict_proba(frame), model.predict_proba(X))


class Boosted(ClassifierMixin, BaseEstimator):
    """The shape of a boosting library: weights are a keyword of fit, and nothing says more."""

    def __init__(self, depth=3):
        self.depth = depth

    def fit(self, X, y, *, sample_weight=None, verbose=False):
        self.weights_, self.labels_ = sample_weight, y
        self.tree_ = DecisionTreeClassifier(max_depth=self.depth, random_state=0).fit(X, y, sample_weight=sample_weight)
        self.classes_ = self.tree_.classes_
        return self

    def predict(self, X):
        return self.tree_.predict(X)


@pytest.mark.parametrize(
    "inner",
    [
        Boosted(),
        HistGradientBoostingClassifier(max_iter=10, max_leaf_nodes=5),
        Pipeline([("scale", StandardScaler()), ("rest", Pipeline([("tree", DecisionTreeClassifier(max_depth=3))]))]),
    ],
)
@pytest.mark.parametrize("routing", [False, True])
def test_another_model_is_refitted_and_judges_the_rounds(inner, routing, data):
    X, y, s = data
    X = X[["skill", "hint"]].fillna(0)
    with config_context(enable_metadata_routing=routing):
        model = InfluenceReweigh(inner, bound=0.05, rounds=5).fit(X, y, sensitive_features=s)
    held, kept = model.validation_, model.kept_
    rounds = model.repair_.rounds
    assert len(rounds) > 1 and abs(model.repair_.best.hard["demographic_parity"]) < 0.6 * abs(rounds[0].hard["demographic_parity"])
    assert abs(model.repair_.best.hard["demographic_parity"]) == pytest.approx(_gap(model, X[held], s[held]))
    assert model.repair_.best.accuracy == pytest.approx(model.score(X[held], y[held]))
    for method in ("predict_proba", "decision_function"):
        assert hasattr(model, method) == hasattr(inner, method)
    if isinstance(inner, Boosted):
        np.testing.assert_array_equal(model.estimator_.weights_, model.sample_weight_[kept])
        np.testing.assert_array_equal(model.estimator_.labels_, y[kept])
        assert not hasattr(inner, "weights_")


def test_model_without_sample_weight(data):
    X, y, s = data
    X = X[["skill", "hint"]].fillna(0)
    model = InfluenceTrim(KNeighborsClassifier(), rounds=3, bound=0.1).fit(X, y, sensitive_features=s)
    alone = KNeighborsClassifier().fit(X[model.kept_], y[model.kept_])
    assert (model.predict(X) == alone.predict(X)).all() and model.kept_.sum() < (~model.validation_).sum()
    InfluenceRelabel(KNeighborsClassifier(), target="utility", rounds=1).fit(X, y)
    with pytest.raises(TypeError, match="estimator: KNeighborsClassifier takes no sample_weight in fit, but InfluenceReweigh"):
        InfluenceReweigh(KNeighborsClassifier()).fit(X, y, sensitive_features=s)
    with pytest.raises(TypeError, match="estimator: Pipeline takes no sample_weight in fit, but sample_weight is given"):
        InfluenceTrim(make_pipeline(KNeighborsClassifier())).fit(X, y, sensitive_features=s, sample_weight=np.ones(len(y)))
    with pytest.raises(TypeError, match="estimator: expected a scikit-learn classifier, got StandardScaler"):
        InfluenceTrim(StandardScaler()).fit(X, y, sensitive_features=s)


def test_grid_search_with_routed_features_and_pipeline(data):
    X, y, s = data
    with config_context(enable_metadata_routing=True):
        model = InfluenceTrim(rounds=1, bound=0.1).set_fit_request(sensitive_features=True)
        search = GridSearchCV(model, {"bound": [0.2, 0.4], "C": [0.1]}, cv=2, error_score="raise").fit(X, y, sensitive_features=s)
        assert search.best_estimator_.kept_.any() and (search.predict(X) == y).mean() > 0.7
    steps = Pipeline([("scale", StandardScaler()), ("fair", InfluenceTrim(rounds=1, bound=0.4))])
    steps.fit(X[["skill", "hint"]].fillna(0), y, fair__sensitive_features=s)
    assert steps.predict(X[["skill", "hint"]].fillna(0)).shape == y.shape


def test_several_gaps_intersections_and_strata(data):
    X, y, s = data
    several = InfluenceReweigh(target=["demographic_parity", "equal_opportunity"], bound=0.2, rounds=3).fit(X, y, sensitive_features=s)
    names = list(several.repair_.best.hard)
    assert "demographic_parity: sex=m − sex=f" in names and "equal_opportunity: sex=m − sex=f, positive samples" in names
    both = pd.DataFrame({"sex": s, "old": X.hint.rank() % 2 > 0})
    crossed = InfluenceTrim(bound=0.5, rounds=1).fit(X, y, sensitive_features=both)
    assert "demographic_parity: sex=m, old=True − sex=f, old=False" in crossed.repair_.best.hard
    strata = InfluenceTrim(bound=0.5, rounds=1).fit(X, y, sensitive_features=s, control_features=X.job)
    assert any("job=a" in name for name in strata.repair_.best.hard)


def test_given_validation_rows_and_weights(data):
    X, y, s = data
    valid, rest = (X[400:], y[400:], s[400:]), slice(0, 400)
    weights = np.where(np.arange(400) % 10, 2.0, 0.0)
    model = InfluenceTrim(rounds=2, bound=0.1).fit(X[rest], y[rest], sample_weight=weights, validation=valid)
    assert not model.validation_.any() and set(np.unique(model.sample_weight_)) == {0.0, 2.0}
    there = weights > 0
    alone = clone(model).fit(X[rest][there], y[rest][there], sample_weight=weights[there], validation=valid)
    np.testing.assert_array_equal(alone.sample_weight_, model.sample_weight_[there])
    reweighed = InfluenceReweigh(rounds=2, bound=0.1).fit(X[rest], y[rest], sample_weight=weights, validation=valid)
    assert 2 < reweighed.sample_weight_.max() <= 4 and not reweighed.sample_weight_[~there].any()
    assert reweighed.predict(X[400:]).shape == (200,)


def test_scores_predict_retraining():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(300, 3))
    y = (X @ [1, -1, 0] + rng.normal(size=300) > 0).astype(int)
    train, valid = slice(0, 200), slice(200, 300)
    scorer = InfluenceScorer(target="utility", surrogate=FunctionTransformer())
    scores = scorer.fit(X[train], y[train], validation=(X[valid], y[valid])).scores_

    def loss(rows):
        model = LogisticRegression(tol=1e-10, solver="newton-cholesky").fit(X[rows], y[rows])
        return log_loss(y[valid], model.predict_proba(X[valid]))

    whole = np.arange(200)
    rows = np.argsort(scores)[::10]
    true = [loss(whole) - loss(np.delete(whole, row)) for row in rows]
    assert np.corrcoef(true, scores[rows])[0, 1] > 0.99 and np.polyfit(scores[rows], true, 1)[0] == pytest.approx(1, abs=0.15)
    # weights count as copies: one row of weight 3 harms three times as much as each of its copies
    copies = np.concatenate([whole, [0, 0]])
    weights = np.where(whole == 0, 3.0, 1.0)
    weighted = clone(scorer).fit(X[train], y[train], sample_weight=weights, validation=(X[valid], y[valid])).scores_
    copied = clone(scorer).fit(X[copies], y[copies], validation=(X[valid], y[valid])).scores_
    np.testing.assert_allclose(weighted, copied[:200] * weights, atol=1e-9)
    core = clone(scorer).set_params(estimator=InnerProduct(Exact("hessian", 1 / 200)))
    assert np.corrcoef(core.fit(X[train], y[train], validation=(X[valid], y[valid])).scores_, scores)[0, 1] > 0.99


def test_scores_of_a_gap_leave_out_validation_rows(data):
    X, y, s = data
    scorer = InfluenceScorer().fit(X, y, sensitive_features=s)
    assert np.array_equal(np.isnan(scorer.scores_), scorer.validation_) and scorer.validation_.sum() == 150
    # the gap lives on favoured men who are not as skilled, and on women who are and were refused
    harmful = ~scorer.validation_ & (scorer.scores_ > np.nanquantile(scorer.scores_, 0.9))
    assert ((s == "m") == (y == "yes"))[harmful].mean() > 0.85
    both = InfluenceScorer(target=["demographic_parity", "equal_opportunity"]).fit(X, y, sensitive_features=s).scores_
    other = InfluenceScorer(target="equal_opportunity").fit(X, y, sensitive_features=s).scores_
    np.testing.assert_allclose(both, scorer.scores_ + other, atol=1e-12)
    with pytest.raises(ValueError, match="estimator: expected 'exact' or an estimator"):
        InfluenceScorer(estimator="best").fit(X, y, sensitive_features=s)


def test_text_through_a_surrogate_of_its_own():
    texts = ["good kind day", "bad sad day", "kind good sun", "sad bad rain"] * 15
    y = np.array([1, 0, 1, 0] * 15)
    model = InfluenceTrim(make_pipeline(TfidfVectorizer(), LogisticRegression()), target="utility", surrogate=TfidfVectorizer(), rounds=1)
    assert (model.fit(texts, y).predict(texts) == y).all()


def test_encoder_takes_what_was_not_there_in_training():
    frame = pd.DataFrame({"a": [1.0, np.nan, 3.0], "b": ["x", None, "y"], "c": pd.array([1, None, 2], dtype="Int64"), "d": [True, False, True]})
    encoder = TableEncoder().fit(frame)
    z = encoder.transform(frame)
    assert z.shape == (3, len(encoder.get_feature_names_out())) and np.isfinite(z).all()
    np.testing.assert_allclose(z[:, 0].mean(), 0, atol=1e-12)
    unknown = encoder.transform(frame.assign(b="z"))
    assert not unknown[:, -3:].any()
    for change, message in (
        (lambda f: f.drop(columns="b"), "X: the columns .'b'. of the training data are missing"),
        (lambda f: f.assign(a=["1", "x", "2"]), "X: expected numbers in the column 'a'"),
        (lambda f: f.assign(a=[1, np.inf, 2]), "X: 1 values of the column 'a' are infinite, first in row 1"),
        (lambda f: f.assign(e=pd.Timestamp(0)), "X: expected numbers or categories in the column 'e'"),
        (lambda f: f.set_axis(["a", "a", "c", "d"], axis=1), "X: the column 'a' occurs twice"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.transform(change(frame))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sensitive_features": None}, "sensitive_features: expected one value per row, since the target is demographic_parity; got None"),
        ({"sensitive_features": ["f"] * 600}, "sensitive_features: expected at least two groups"),
        ({"sensitive_features": [None] + ["f", "m"] * 299 + ["f"]}, "sensitive_features: 1 of 600 values"),
        ({"sensitive_features": np.linspace(0, 1, 600)}, "sensitive_features: .* holds measurements"),
        ({"sensitive_features": ["f", "m"]}, "sensitive_features: expected one value for each of the 600 rows, got 2"),
        ({"sensitive_features": ["f", "m"] * 295 + ["x"] * 10}, "expected at least 10 validation samples in every cell"),
        ({"sensitive_features": ["a"] + ["f", "m"] * 299 + ["f"]}, "sensitive_features: none of the rows of .*=a'. was held out"),
        ({"sample_weight": np.zeros(600)}, "sample_weight: expected at least one above 0, but all are zero"),
        ({"sample_weight": -np.ones(600)}, "sample_weight: expected 600 numbers from 0 on"),
        ({"sample_weight": np.ones(5)}, "sample_weight: expected 600 numbers"),
        ({"y": ["yes"] * 600}, "y: expected two classes, got 1 class"),
        ({"y": ["yes", "no", "perhaps"] * 200}, "Only binary classification is supported. The type of the target is multiclass"),
        ({"y": np.array(["yes", None, "no"] * 200, dtype=object)}, "y: 200 of 600 labels are missing|Unknown label type"),
        ({"y": ["yes", "no"]}, "y: expected one label for each of the 600 rows, got 2"),
        ({"target": "fairness"}, "target: expected 'utility', or one or several of demographic_parity"),
        ({"target": ["utility", "demographic_parity"]}, "target: expected 'utility'"),
        ({"target": "mean_prediction_gap"}, "target: expected 'utility'"),
        ({"positive": "maybe"}, "positive: expected one of the labels ..no., .yes.., got 'maybe'"),
        ({"validation_fraction": 1.0}, "validation_fraction: expected a share between 0 and 1, got 1.0"),
        ({"C": 0}, "C: expected a number above 0, got 0"),
        ({"budget": 2.0}, "budget"),
        ({"validation": "half"}, "validation: expected .X, y."),
        ({"validation": ([[0.0, 0, 0]] * 20, ["perhaps"] * 20)}, "y: expected the labels .*, got .'perhaps'. as well"),
    ],
)
def test_bad_input(given, message, data):
    X, y, s = data
    of_fit = {name: given[name] for name in ("sensitive_features", "sample_weight", "validation") if name in given}
    settings = {name: value for name, value in given.items() if name not in (*of_fit, "y")}
    if "validation" in given:
        X = X[["skill", "hint", "skill"]].to_numpy()
    with pytest.raises(ValueError, match=message):
        InfluenceTrim(**settings).fit(X, given.get("y", y), **{"sensitive_features": s, **of_fit})


@pytest.mark.parametrize("target", ["demographic_parity", "utility"])
def test_validation_must_not_be_the_training_rows(target, data):
    X, y, s = data
    order = np.random.default_rng(0).permutation(len(y))
    with pytest.raises(ValueError, match="validation: the rows are those of the training data"):
        InfluenceTrim(target=target).fit(X, y, validation=(X.iloc[order], y[order], s.iloc[order]))
    with pytest.raises(ValueError, match="sensitive_features: .* as third part of validation"):
        InfluenceTrim().fit(X, y, sensitive_features=s, validation=(X[:100], y[:100]))


def test_bound_that_cannot_be_met_is_named(data):
    X, y, s = data
    with pytest.warns(UserWarning, match="demographic_parity within 0 cannot be met at an accuracy loss of at most 0: the best found on validation"):
        model = InfluenceTrim(bound=0, max_accuracy_loss=0, rounds=1).fit(X, y, sensitive_features=s)
    assert "demographic_parity" in model.repair_.unmet
