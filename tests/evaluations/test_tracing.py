"""evaluations/tracing.py and evaluations/texts.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robust_if.checkpoints import Checkpoint
from robust_if.data import Samples
from robust_if.estimators import InnerProduct
from robust_if.evaluations.report.trace import html
from robust_if.evaluations.texts import Columns, Loaded, Source, Texts, repeated
from robust_if.evaluations.tracing import Trace, forms, trace
from robust_if.language import small
from robust_if.pairs import pairwise
from robust_if.sweep import Sweep
from robust_if.task import Task
from robust_if.token_losses import NOT_LEARNT
from tiny_texts import MODEL, TOKENIZER, loaded, rows

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def texts() -> Texts:
    return loaded().texts(rows(10), "data")


def test_it_is_the_matrix_of_pairs(texts: Texts) -> None:
    queries = loaded().texts(rows(10).select([2, 5]), "queries")
    found = trace(loaded().task, texts, queries, estimator=InnerProduct(), top=3)
    expected = pairwise(loaded().task, texts.samples, queries.samples, sweep=Sweep(batch_size=4))
    np.testing.assert_allclose(found.matrix, expected, rtol=1e-9, atol=1e-14)
    behind = [[i for i, _ in side] for side in found.sides()["behind"]]
    assert behind == [np.argsort(column, kind="stable")[:3].tolist() for column in expected.T]


@pytest.mark.parametrize("estimator", ["ip", "ip-layer", "ekfac"])
def test_checkpoints_are_summed_with_their_weights(texts: Texts, estimator: str) -> None:
    task, queries = loaded().task, loaded().texts(rows(2), "queries")
    form = forms()[estimator]
    state = Checkpoint.of(task.model).state
    along = [Checkpoint(state, 0.5), Checkpoint({name: 0.9 * value for name, value in state.items()}, 2.0)]
    found = trace(task, texts, queries, estimator=form, checkpoints=along)
    single = [trace(task.at(each.state), texts, queries, estimator=form).matrix for each in along]
    scale = 2.5 if form.units == "target" else 1.0
    np.testing.assert_allclose(found.matrix, (0.5 * single[0] + 2.0 * single[1]) / scale, rtol=1e-8, atol=1e-12)


def test_the_overlap_finds_every_text_itself_and_has_one_side(texts: Texts) -> None:
    task = replace(loaded().task, parameters=("*c_attn.weight", "*c_proj.weight"))
    found = trace(task, texts, texts, estimator=forms()["overlap"], top=2)
    sides = found.sides()
    assert [each[0][0] for each in sides["behind"]] == list(range(10)) and not any(sides["against"])
    page = html(result(estimator="overlap"))
    assert "Related" in page and "Against it" not in page and "Against it" in html(result())


def test_the_forms_are_those_that_compare_pairs() -> None:
    known = forms()
    assert {"ip", "ip-cosine", "ip-layer", "datainf", "datainf-cosine", "datainf-layer", "ekfac"} <= set(known)
    assert "empirical" in repr(known["ekfac"]) and "sampled" in repr(forms("classification")["ekfac"])
    assert all(name == each.name for name, each in known.items()) and not {"loss", "fvm", "label-odds"} & set(known)


def test_the_table_holds_both_directions_in_order(texts: Texts) -> None:
    matrix = np.array([[-1.0, 0.5], [2.0, 0.25], [-3.0, 1.0], [0.0, 0.0]])
    few = replace(texts, samples=texts.samples.take(range(4)))
    table = Trace(matrix, few, replace(few, samples=few.samples.take([0, 1])), 3, "given").table()
    assert table.values.tolist() == [
        ["a0", 1, "a2", -3.0, "behind"], ["a0", 2, "a0", -1.0, "behind"], ["a0", 1, "a1", 2.0, "against"],
        ["a1", 1, "a2", 1.0, "against"], ["a1", 2, "a0", 0.5, "against"], ["a1", 3, "a1", 0.25, "against"],
    ]  # fmt: skip


def test_what_the_model_says_is_traced_token_by_token() -> None:
    source, data = loaded(), rows(3).remove_columns("completion")
    prompts = source.prompts(data, 4)
    assert prompts is not None
    found = source.completed(data, prompts, 4)
    tokens, labels = found.samples.batch(slice(None))
    for i, prompt in enumerate(prompts):
        assert tokens[i, : len(prompt)].tolist() == prompt and (labels[i, : len(prompt)] == NOT_LEARNT).all()
        said = labels[i][labels[i] != NOT_LEARNT]
        for k, token in enumerate(said.tolist()):  # the most likely one at every place
            logits = MODEL(input_ids=tokens[i : i + 1, : len(prompt) + k]).logits[0, -1]
            assert int(logits.argmax()) == token
        assert found.shown(i)["text"] == TOKENIZER.decode(said, skip_special_tokens=True) and found.shown(i)["prompt"] == data[i]["prompt"]
    assert found.samples.ids.tolist() == ["a0", "a1", "a2"]


def test_completions_are_kept_for_a_later_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = loaded(), rows(3).remove_columns("completion")
    prompts = source.prompts(data, 4)
    assert prompts is not None
    first = source.completed(data, prompts, 4, kept=tmp_path / "kept.json")
    monkeypatch.setattr(Loaded, "_completion", lambda *_: pytest.fail("asked again"))
    again = source.completed(data, prompts, 4, kept=tmp_path / "kept.json")
    assert all(torch.equal(a, b) for a, b in zip(first.samples.batch(slice(None)), again.samples.batch(slice(None)), strict=True))


@pytest.mark.parametrize(
    "data",
    [{"text": ["a b"]}, {"prompt": ["a"], "completion": ["b"]}, {"input_ids": [[5, 6]]}, {"messages": [[{"role": "assistant", "content": "b"}]]}],
)
def test_queries_that_carry_all_are_not_completed(data: dict[str, Any]) -> None:
    assert loaded().prompts(datasets.Dataset.from_dict(data), 4) is None


def test_conversations_are_completed_and_shown_by_turns() -> None:
    tokenizer = small.tokenizer(["hello there"], vocabulary=300, positions=64)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    model = small.language_model(tokenizer, layers=1, width=8, heads=1)
    source = Loaded(Source(Path("none")), Task.from_transformers(model, tokenizer), tokenizer)
    asked = [{"role": "user", "content": "hello"}]
    prompts = source.prompts(datasets.Dataset.from_list([{"messages": asked}]), 3)
    assert prompts is not None and tokenizer.decode(prompts[0]) == "user: hello\nassistant: "
    assert source.completed(datasets.Dataset.from_list([{"messages": asked}]), prompts, 3).shown(0)["prompt"] == "user: hello\n"
    whole = source.texts(datasets.Dataset.from_list([{"messages": [*asked, {"role": "assistant", "content": "there"}]}]), "data")
    assert whole.shown(0) == {"id": 0, "prompt": "user: hello\n", "text": "there", "label": None}


def test_tokens_are_shown_as_text(texts: Texts) -> None:
    tokens, labels = texts.samples.batch(slice(0, 2))
    given = [{"input_ids": row[row >= 0].tolist(), "labels": y[row >= 0].tolist()} for row, y in zip(tokens, labels, strict=True)]
    shown = loaded().texts(datasets.Dataset.from_list(given), "data").shown(0)
    assert (shown["prompt"] + shown["text"]).strip() == (rows(1)[0]["prompt"] + rows(1)[0]["completion"]).strip()
    packed = [{"input_ids": given[0]["input_ids"] + given[1]["input_ids"], "seq_lengths": [len(each["input_ids"]) for each in given]}]
    both = loaded().texts(datasets.Dataset.from_list(packed), "data")
    assert len(both.samples) == 2 and rows(2)[1]["completion"] in both.shown(1)["text"]


def test_classes_are_called_as_the_data_or_the_model_call_them() -> None:
    model = small.classifier(TOKENIZER, 2, layers=1, width=8, heads=1)
    source = Loaded(Source(Path("none"), kind="classification"), Task.from_transformers(model, TOKENIZER, "classification"), TOKENIZER)
    data = datasets.Dataset.from_dict({"text": ["say apple", "say stone"], "label": [1, 0]})
    assert [source.texts(data, "data").shown(i)["label"] for i in range(2)] == ["1", "0"]
    named = data.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    assert source.texts(named, "data").shown(0)["label"] == "good"
    bare = source.predicted(data.remove_columns("label"), "queries", source.texts(named, "data"))
    assert bare.own and set(bare.classes) == {"bad", "good"} and bare.samples.labels.shape == (2,)
    model.config.id2label, model.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    words = source.texts(datasets.Dataset.from_dict({"text": ["say apple"], "label": ["yes"]}), "data")
    assert words.samples.labels.tolist() == [1] and words.shown(0)["label"] == "yes"


def test_a_text_longer_than_the_model_takes_is_named() -> None:
    source = loaded()
    long = Samples((torch.ones(2, 60, dtype=torch.int64), torch.ones(2, 60, dtype=torch.int64)), np.array(["x", "y"]))
    with pytest.raises(ValueError, match="the model takes up to 48 tokens, id x has 60; pass max_length=48"):
        source.check(long)


def test_repeated_texts_are_counted(texts: Texts) -> None:
    assert repeated(texts.samples.take([0, 3]), texts.samples) == 2
    assert repeated(texts.samples.take([0, 3]), texts.samples.take([3, 4])) == 1


def test_columns_of_a_csv_file_stay_text(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("question,answer\n1,007\n")
    assert Columns(prompt="question", completion="answer").read(tmp_path / "data.csv")[0] == {"question": "1", "answer": "007"}


def result(**changes: Any) -> dict[str, Any]:
    entry = {"id": "<b>1", "prompt": "<i>", "text": "&" * 500, "label": None, "score": -0.25}
    query = {**entry, "own": True, "behind": [entry], "against": []}
    return {
        "data": "d", "n_train": 3, "asked": "q", "n_queries": 1, "model": "m", "kind": "causal-lm", "estimator": "ip", "checkpoints": 0,
        "queries": [query], "warnings": ["<u>"], "command": "c", **changes,
    }  # fmt: skip


def test_the_page_escapes_everything_and_folds_long_texts() -> None:
    page = html(result())
    assert not any(tag in page for tag in ("<b>", "<i>", "<u>", "<script")) and "&lt;b&gt;1" in page
    assert page.count("<summary>Whole text</summary>") == 2 and "\N{MINUS SIGN}0.250" in page and "behind 1\N{NO-BREAK SPACE}generation<" in page


@pytest.mark.parametrize("field", ["queries", "estimator", "command"])
def test_a_page_of_half_a_result_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"missing the fields .*{field}"):
        html({name: value for name, value in result().items() if name != field})
    with pytest.raises(ValueError, match="result.json: behind: missing the fields"):
        html(result(queries=[{**result()["queries"][0], "behind": [{"id": 1}]}]))
