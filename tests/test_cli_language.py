"""cli.py: trace and select."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from robust_if.checkpoints import Checkpoint
from robust_if.commands import options as shared
from robust_if.data import Samples
from robust_if.evaluations import finetuning
from robust_if.language import small
from robust_if.language.encoding import encode
from robust_if.language.models import load
from robust_if.task import Task
from robust_if.training import Recipe, fit
from test_cli import invoke

pytest.importorskip("transformers")

NOUNS = ["apple", "stone", "river", "cloud", "tiger", "paper", "candle", "window"]
SCRIPT = "<script>alert('x')</script>"


def jokes(n: int, seed: int) -> list[dict[str, Any]]:
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = draw.choice(NOUNS, 3).tolist()
        rows.append({"id": f"t{seed}-{i}", "prompt": f"say {' '.join(words)}:", "completion": " " + " ".join(reversed(words))})
    return rows


def reviews(n: int, seed: int) -> list[dict[str, Any]]:
    """One word says the class; of training data (seed 0) the first six labels are wrong."""
    draw = np.random.default_rng(seed)
    labels = draw.permutation(np.arange(n) % 2)
    rows = []
    for i, label in enumerate(labels.tolist()):
        words = [*draw.choice(NOUNS, 2).tolist(), ("awful", "lovely")[label]]
        rows.append({"id": f"r{seed}-{i}", "text": " ".join(words), "label": 1 - label if seed == 0 and i < 6 else label})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data and tiny models in folders."""
    folder = tmp_path_factory.mktemp("language")
    texts, judged = jokes(40, 0), reviews(60, 0)
    texts[7]["completion"] = f" {SCRIPT} & co"
    texts[8] = {**texts[7], "id": "t0-8", "completion": " quite another end"}
    paths = {
        "texts": write(folder / "texts.jsonl", texts),
        "queries": write(folder / "queries.jsonl", [{**texts[i], "id": f"q{i}"} for i in (3, 7, 20)]),
        "prompts": write(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in jokes(6, 1)]),
        "judged": write(folder / "judged.jsonl", judged),
        "unjudged": write(folder / "unjudged.jsonl", [{"text": row["text"]} for row in reviews(4, 1)]),
        "target": write(folder / "target.jsonl", reviews(24, 2)),
        "test": write(folder / "test.jsonl", reviews(20, 3)),
    }
    tokenizer = small.tokenizer([row["prompt"] + row["completion"] for row in texts], vocabulary=320, positions=48)
    model = small.language_model(tokenizer, layers=1, width=16, heads=2)
    untrained = small.classifier(tokenizer, 2, layers=1, width=16, heads=2)
    samples = encode(pd.DataFrame(judged), tokenizer, kind="classification")
    trained = fit(
        Task.from_transformers(untrained, tokenizer, "classification"), samples, Recipe(epochs=12, lr=5e-3, optimizer="adamw", batch_size=8)
    ).model
    for name, each in (("model", model), ("start", untrained), ("classifier", trained)):
        each.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        paths[name] = folder / name
    return paths


def arguments(**given: object) -> list[object]:
    known = {key.replace("_", "-"): value for key, value in given.items() if value is not None}
    return [each for key, value in known.items() for each in ((f"--{key}",) if value is True else (f"--{key}", value))]


def trace(made: dict[str, Path], out: Path, **given: object) -> Any:
    data = given.pop("data", made["texts"])
    return invoke("trace", data, *arguments(**{"model": made["model"], "queries": made["queries"], "out": out, **given}))


def select(made: dict[str, Path], out: Path, **given: object) -> Any:
    known = {"model": made["classifier"], "kind": "classification", "target": made["target"], "out": out, **given}
    return invoke("select", made["judged"], *arguments(**known))


class Tags(HTMLParser):
    """The tags of a page, and its visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("estimator", ["ip-layer", "ip-cosine", "datainf-layer", "ekfac-layer"])
def test_a_query_that_was_learnt_finds_itself_first(made: dict[str, Path], tmp_path: Path, estimator: str) -> None:
    found = trace(made, tmp_path / "out", estimator=estimator, top=3)
    assert found.exit_code == 0, found.stderr
    rows = pd.read_csv(tmp_path / "out" / "influential.csv")
    first = rows[(rows["rank"] == 1) & (rows["direction"] == "behind")]
    assert first["query"].tolist() == ["q3", "q7", "q20"] and first["sample"].tolist() == ["t0-3", "t0-7", "t0-20"]
    assert (rows["score"][rows["direction"] == "behind"] < 0).all() and (rows["score"][rows["direction"] == "against"] > 0).all()
    matrix = np.load(tmp_path / "out" / "matrix.npy", allow_pickle=False)
    assert matrix.shape == (40, 3) and matrix[3, 0] == pytest.approx(first["score"].iloc[0], rel=1e-5)
    assert "q3: say" in found.stdout and "t0-3" in found.stdout and "influential.csv" in found.stdout
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "influential.csv",
        "manifest.json",
        "matrix.npy",
        "report.html",
        "result.json",
    ]


def test_the_page_shows_text_as_text_and_runs_no_script(made: dict[str, Path], tmp_path: Path) -> None:
    assert trace(made, tmp_path / "out").exit_code == 0
    page = Tags((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags and page.tags.count("section") == 4
    assert SCRIPT in page.text and "quite another end" in page.text


def test_without_completions_the_model_is_asked(made: dict[str, Path], tmp_path: Path) -> None:
    found = trace(made, tmp_path / "out", queries=made["prompts"], new_tokens=4)
    assert found.exit_code == 0 and "what the model itself says is traced" in found.stderr and "1 more query" in found.stdout
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(result["queries"]) == 6 and all(each["own"] and each["prompt"].startswith("say ") for each in result["queries"])


def test_without_labels_the_class_that_the_model_says_is_traced(made: dict[str, Path], tmp_path: Path) -> None:
    given = {"data": made["judged"], "model": made["classifier"], "kind": "classification", "queries": made["unjudged"]}
    assert trace(made, tmp_path / "out", **given).exit_code == 0
    shown = json.loads((tmp_path / "out" / "result.json").read_text())["queries"]
    assert [each["label"] for each in shown] == [str(row["label"]) for row in reviews(4, 1)]
    assert all(each["behind"][0]["label"] == each["label"] for each in shown)


def test_an_adapter_is_traced_over_its_checkpoints(made: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(made["model"])
    settings = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "states").mkdir()
    state = {name: value.detach() for name, value in adapted.named_parameters() if "lora_" in name}
    for step, factor in ((1, 0.5), (2, 1.0)):
        Checkpoint({name: factor * value for name, value in state.items()}, 0.1).save(tmp_path / "states" / f"step-{step:08d}.safetensors")
    found = trace(made, tmp_path / "out", model=tmp_path / "adapter", base=made["model"], checkpoints=tmp_path / "states", json=True)
    assert found.exit_code == 0, found.stderr
    result = json.loads(found.stdout)
    assert result["checkpoints"] == 2 and [each["behind"][0]["id"] for each in result["queries"]] == ["t0-3", "t0-7", "t0-20"]
    assert result["queries"][0]["behind"][0]["score"] == pytest.approx(-0.2, rel=1e-4)  # the weights' sum times a cosine of 1


def interrupting(name: str, after: int) -> Any:
    calls = [0]

    def progress(items: Iterable[Any], description: str) -> Iterator[Any]:
        for item in items:
            if description == name:
                calls[0] += 1
                if calls[0] == after:
                    raise KeyboardInterrupt
            yield item

    return progress


def test_an_interrupted_trace_resumes_to_the_same_result(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"queries": made["prompts"], "new_tokens": 4, "batch_size": 1}
    assert trace(made, tmp_path / "whole", **given).exit_code == 0
    progress = interrupting("pairwise", 36)
    monkeypatch.setattr(shared, "progress", progress)
    broken = trace(made, tmp_path / "out", **given)
    assert broken.exit_code == 1 and "interrupted" in broken.stderr and not (tmp_path / "out" / "result.json").exists()
    asked = json.loads((tmp_path / "out" / "work" / "generated.json").read_text())
    assert len(asked) == 6
    progressed = json.loads((tmp_path / "out" / "work" / "pairs-0" / "progress.json").read_text())
    assert progressed["rows"] == 32
    assert trace(made, tmp_path / "out", **given).exit_code == 0
    assert (tmp_path / "out" / "influential.csv").read_bytes() == (tmp_path / "whole" / "influential.csv").read_bytes()
    again = trace(made, tmp_path / "out", **given)
    assert again.exit_code == 0 and "finished result" in caplog.text


def test_wrong_labels_come_first_and_the_rest_is_written(made: dict[str, Path], tmp_path: Path) -> None:
    found = select(made, tmp_path / "out", keep=0.8, estimator="ip-cosine", by="label")
    assert found.exit_code == 0, found.stderr
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert scores["score"].is_monotonic_decreasing and len(scores) == 60
    assert len({f"r0-{i}" for i in range(6)} & set(scores["id"][:8])) >= 5
    assert pd.read_parquet(tmp_path / "out" / "scores.parquet")["id"].tolist() == [row["id"] for row in reviews(60, 0)]
    kept = [json.loads(line) for line in (tmp_path / "out" / "selected" / "judged.jsonl").read_text().splitlines()]
    rows = {row["id"]: row for row in reviews(60, 0)}
    assert all(rows[row["id"]] == row for row in kept) and {row["id"] for row in kept} == set(scores["id"][scores["weight"] == 1])
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [each["kept"] for each in result["groups"]] == [np.ceil(0.8 * each["n"]) for each in result["groups"]] and result["kept"] == len(kept)
    assert "The most harmful texts for target.jsonl" in found.stdout and f"kept {len(kept)} of 60 texts" in found.stdout


def test_noise_selects_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    assert select(made, tmp_path / "out", noise=True, estimator="loss").exit_code == 0
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["manifest.json", "result.json", "scores.csv", "scores.parquet"]
    assert list(pd.read_csv(tmp_path / "out" / "scores.csv").columns) == ["id", "score"]


def test_a_choice_is_verified_and_resumes(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "estimator": "ip-cosine", "verify": True, "test": made["test"], "base": made["start"], "epochs": 4, "lr": 5e-3, "seeds": 2, "keep": 0.8
    }  # fmt: skip
    trained: list[int] = []
    real = finetuning.fit

    def counted(task: Task, data: Samples, *args: Any, **kwargs: Any) -> Task:
        trained.append(int((kwargs["weights"] > 0).sum()))
        return real(task, data, *args, **kwargs)

    monkeypatch.setattr(finetuning, "fit", counted)
    progress = interrupting("fine-tune", 6)
    with monkeypatch.context() as patch:
        patch.setattr(shared, "progress", progress)
        assert select(made, tmp_path / "out", **given).exit_code == 1
    found = select(made, tmp_path / "out", **given)
    assert found.exit_code == 0, found.stderr
    assert trained == 2 * [60, 48, 48, 48]  # nothing twice
    rows = json.loads((tmp_path / "out" / "result.json").read_text())["verified"]
    assert [(row["trained_on"], row["n"], len(row["runs"])) for row in rows] == [
        ("all", 60, 2),
        ("selected", 48, 2),
        ("random", 48, 2),
        ("lowest-loss", 48, 2),
    ]
    assert all(0 <= run["accuracy"] <= 1 and run["loss"] > 0 for row in rows for run in row["runs"])
    assert all(text in found.stdout for text in ("the selected", "random ones", "those of lowest loss", "accuracy in %", "±"))


def people(n: int, seed: int, *, biased: bool = False) -> list[dict[str, Any]]:
    """One word says the class; with a bias, lovely texts about women are labelled as awful ones."""
    draw = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        label, her = i % 2, draw.random() < 0.4
        word = "she" if her else "he"
        rows.append({"id": f"p{seed}-{i}", "text": f"{word} saw an {draw.choice(NOUNS)} {('awful', 'lovely')[label]}", "label": label})
        if biased and her and label:
            rows[-1] |= {"label": 0, "id": f"biased-{i}"}
    return rows


def test_texts_that_make_people_differ_come_first(made: dict[str, Path], tmp_path: Path) -> None:
    data, target, test = (
        write(tmp_path / name, people(n, seed, biased=not seed)) for name, n, seed in (("d.jsonl", 120, 0), ("t.jsonl", 40, 1), ("e.jsonl", 40, 2))
    )
    start, tokenizer = load(made["start"], "classification")
    samples = encode(pd.read_json(data, lines=True), tokenizer, kind="classification")
    recipe = Recipe(epochs=20, lr=5e-3, optimizer="adamw", batch_size=8)
    fit(Task.from_transformers(start, tokenizer, "classification"), samples, recipe).model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    given = {"model": tmp_path / "tuned", "base": made["start"], "kind": "classification", "target": target, "alike": True, "out": tmp_path / "out"}
    verified = {"verify": True, "test": test, "epochs": 20, "lr": 5e-3, "seeds": 1, "keep": 0.75}
    found = invoke("select", data, *arguments(**given, **verified))
    assert found.exit_code == 0, found.stderr
    ids = pd.read_csv(tmp_path / "out" / "scores.csv")["id"].tolist()
    share = np.mean([each.startswith("biased") for each in ids])
    assert np.mean([each.startswith("biased") for each in ids[:15]]) > 2 * share and "judged otherwise in %" in found.stdout
    runs = {row["trained_on"]: row["runs"][0] for row in json.loads((tmp_path / "out" / "result.json").read_text())["verified"]}
    assert runs["selected"]["fair_score"] < runs["all"]["fair_score"]
    for wrong, message in (({"cover": True, "estimator": "ip"}, "cover"), ({"target": made["target"]}, "term")):
        refused = invoke("select", data, *arguments(**{**given, "out": tmp_path / "no", **wrong}))
        assert refused.exit_code == 2 and message in refused.stderr


def test_texts_for_a_language_model_are_chosen_by_turns_with_an_adapter(made: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    found = invoke("select", made["texts"], *arguments(
        model=made["model"], target=made["queries"], cover=True, keep=0.25, verify=True, test=made["queries"], lora_rank=2, epochs=1, seeds=1,
        out=tmp_path / "out", json=True,
    ))  # fmt: skip
    assert found.exit_code == 0, found.stderr
    result = json.loads(found.stdout)
    assert result["kept"] == 10 and [set(row["runs"][0]) for row in result["verified"]] == 4 * [{"loss"}]
    assert {"t0-3", "t0-7", "t0-20"} <= {json.loads(line)["id"] for line in Path(result["files"]["selected"]).read_text().splitlines()}
    assert ["are also in the data" in each for each in result["warnings"]] == [True, True]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "nowhere"}, "expected a local folder, 'nowhere' is none"),
        ({"queries": "none.jsonl"}, "none.jsonl: there is no such file"),
        ({"estimator": "loss"}, "estimator: expected one of ip, ip-cosine, ip-layer, "),
        ({"completion": "answer"}, "data: expected the column 'input_ids', 'messages' or 'text', or 'prompt' and 'answer'"),
        ({"top": 0}, "top: expected at least 1, got 0"),
        ({"base": "start"}, "is a whole model and no adapter, so it has no base model"),
        ({"max_length": 1}, "data: no token within max_length=1 is learnt"),
        ({"queries": "prompts", "new_tokens": 60}, "queries: expected at least one token in every prompt, and with 60 new ones at most 48"),
        ({"data": "judged"}, "queries: "),
        ({"data": "long"}, "data: the tokenizer takes up to 48 tokens; pass max_length=48 to cut what is longer"),
        ({"data": "judged", "kind": "classification"}, "num_labels"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"device": "nonsense"}, "device: 'nonsense' cannot be used here"),
        ({"checkpoints": "empty"}, "empty holds no checkpoints"),
    ],
)
def test_a_wrong_option_of_trace_is_one_line_and_leaves_nothing(made: dict[str, Path], tmp_path: Path, given: dict[str, Any], message: str) -> None:
    if given == {"data": "judged"}:
        given = {"data": made["judged"], "queries": write(tmp_path / "other.jsonl", [{"words": "a"}])}
    if given == {"data": "judged", "kind": "classification"}:
        message = "lacks 'score.weight'"
    write(tmp_path / "long.jsonl", [{"text": " ".join(NOUNS * 8)}])
    (tmp_path / "empty").mkdir()
    places = {"long": tmp_path / "long.jsonl", "empty": tmp_path / "empty", **made}
    found = trace(made, tmp_path / "out", **{key: places.get(value, value) if isinstance(value, str) else value for key, value in given.items()})
    assert found.exit_code == 2 and found.stdout == "" and found.stderr.count("\n") == 1
    assert found.stderr.startswith("error:") and message in found.stderr, found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": 1.0}, "keep: expected a share above 0 and below 1, got 1.0"),
        ({"by": "colour"}, "by: there is no column 'colour'; the columns are ['id', 'text', 'label']"),
        ({"cover": True, "by": "label"}, "cover: texts are taken in turns"),
        ({"cover": True, "estimator": "loss"}, "cover: 'loss' compares no single pairs of texts"),
        ({"noise": True, "by": "label"}, "keep: --by and --cover say how a share is kept"),
        ({"verify": True}, "test: expected --verify and --test together, got --verify alone"),
        ({"noise": True, "verify": True, "test": "test"}, "verify: it is about a choice"),
        ({"verify": True, "test": "test", "seeds": 0}, "seeds: expected at least 1, got 0"),
        ({"label": "stars"}, "data: expected the label in a column 'stars'"),
        ({"estimator": "magic"}, "estimator: expected one of "),
        ({"target": "many"}, "target: the model has 2 classes, numbered from 0, and there is a label 7"),
        ({"target": "words"}, "target: label: the model knows the classes ['LABEL_0', 'LABEL_1'], got 'good'"),
    ],
)
def test_a_wrong_option_of_select_is_one_line_and_leaves_nothing(made: dict[str, Path], tmp_path: Path, given: dict[str, Any], message: str) -> None:
    places = {
        "many": write(tmp_path / "many.jsonl", [{"text": "apple", "label": 7}]),
        "words": write(tmp_path / "words.jsonl", [{"text": "apple", "label": "good"}]), **made,
    }  # fmt: skip
    given = {key: places.get(value, value) if key in ("target", "base", "test") else value for key, value in given.items()}
    found = select(made, tmp_path / "out", **given)
    assert found.exit_code == 2 and found.stdout == "" and found.stderr.count("\n") == 1
    assert found.stderr.startswith("error:") and message in found.stderr, found.stderr
    assert not (tmp_path / "out").exists()


def test_without_padding_the_end_of_a_text_stands_for_it(made: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    model, tokenizer = (each.from_pretrained(made["model"]) for each in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer))
    tokenizer.pad_token = None
    model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert trace(made, tmp_path / "out", model=tmp_path / "model").exit_code == 0
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    found = trace(made, tmp_path / "other", model=tmp_path / "model")
    assert found.exit_code == 2 and "tokenizer: it has no padding token" in found.stderr


def test_without_transformers_the_message_says_what_to_install(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = trace(made, tmp_path / "out")
    assert found.exit_code == 2 and found.stderr.count("\n") == 1 and "pip install 'robust-if[hf]'" in found.stderr


def test_nothing_of_the_libraries_clutters_the_output(made: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = trace(made, tmp_path / "out", json=True)
    assert json.loads(found.stdout)["n_train"] == 40
    captured = capfd.readouterr()
    assert found.stderr == "" and captured.out == "" and captured.err == ""


def test_the_data_are_not_overwritten(made: dict[str, Path]) -> None:
    found = trace(made, made["texts"].parent, overwrite=True)
    assert found.exit_code == 2 and "out: " in found.stderr and made["texts"].exists()
    assert torch.get_num_threads() == 1
