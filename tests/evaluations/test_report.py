"""The report says what the files say, escapes what the data say, and opens offline in a browser."""

import base64
import html
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from robust_if.evaluations.report import charts, render, words
from robust_if.evaluations.report.contents import FILES, read

ATTACK = "<script>alert(1)</script>"
QUOTED = 'it\'s "7" & <b>'
HEIGHT, N = 900, 60


def png(width: int = 8, height: int = 8) -> str:
    """A black PNG as a data URI, written by hand so that the test needs no image library."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(b"".join(b"\0" + b"\0" * width for _ in range(height)))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(data).decode()


def detected(directory: Path, kind: str = "image", *, known: bool = True, **changes: object) -> Path:
    """A directory as ``robust-if detect`` writes it, with hostile values where data may bring them; ``changes`` go into result.json."""
    generator = np.random.default_rng(0)
    ids = [QUOTED, *(f"s{i}" for i in range(1, N))]
    truth = np.arange(N) % 5 == 0
    values = np.where(truth, 1.0, -0.2) * np.exp(generator.normal(0, 1.5, N))
    removed = values > 0.5
    columns = {"fvm:utility": values, "loss": np.abs(values), f"odd{ATTACK}": np.zeros(N)}
    metrics = {"auroc": 0.97, "average_precision": 0.9, "precision_at_k": 0.8, "tpr_at_1_fpr": 0.7, "tpr_at_5_fpr": 0.75}
    metrics |= {"auroc_interval": [0.94, 0.99]}
    unknown = dict.fromkeys(metrics)
    detection = [
        {"estimator": name.partition(":")[0], "target": name.partition(":")[2], "seconds": 1.0 + i, **(metrics if known else unknown)}
        for i, name in enumerate(columns)
    ]
    result = {
        "title": f"Run {ATTACK}", "data": "toy.csv", "kind": kind, "model": "logistic regression", "n_train": N, "n_valid": 20,
        "n_test": 400, "decided_by": "fvm:utility", "decision": "automatic threshold", "threshold": 0.5, "detection": detection,
        "accuracy": {"before": 0.9124, "after": 0.958, "random": 0.909, "oracle": 0.96 if known else None, "relabelled": None},
        "accuracy_runs": {"before": [0.91, 0.9148], "after": [0.957, 0.959]}, "removed": int(removed.sum()),
        "warnings": [f"watch {ATTACK}"],
        "settings": {"seeds": 2, "key</script>": {"nested": "</script>"}}, "versions": {"python": "3"},
        "command": "robust-if detect 'a & b' --out <x>",
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "result.json").write_text(json.dumps(result | changes))
    pd.DataFrame({"id": ids, **columns}).to_parquet(directory / "scores.parquet")
    samples = pd.DataFrame({"id": ids, "label": "a", "suggested_label": "b", "removed": removed})
    (samples.assign(mislabelled=truth) if known else samples).to_parquet(directory / "samples.parquet")
    worst = [
        {
            "id": ids[i], "label": ATTACK, "suggested": "b", "score": float(values[i]), "removed": bool(removed[i]),
            "mislabelled": bool(truth[i]) if known else None, "image": png() if kind == "image" else None,
            "row": {f"column {j}": 0.5 for j in range(14)} | {ATTACK: ATTACK, "wide": "x" * 300} if kind == "table" else None,
            "text": f"{ATTACK} " + "long words " * 80 + "y" * 300 if kind == "text" else None,
        }
        for i in np.argsort(-values)[:30]
    ]  # fmt: skip
    (directory / "worst.json").write_text(json.dumps(worst))
    return directory


def attacked(directory: Path, kind: str = "image", *, known: bool = True, attack: dict[str, object] | None = None, **changes: object) -> Path:
    """The same with attack inputs: two verdicts, and who was removed."""
    success = {"before": 0.99, "after": 0.02, "random": 0.98, "oracle": 0.0 if known else None, "relabelled": 0.5, "scored": 0.99}
    said = {
        "inputs": "x.csv", "goal_class": ATTACK, "seen": 5, "measured": 5, "shared": False, "failed": False, "success": success,
        "success_runs": {"before": [0.98, 1.0], "after": [0.02, 0.02]}, "max_false_positives": 0.01, "poisoned": 12, "harms_utility": 3, "both": 1,
        "harms_by": "loss",
    } | (attack or {})  # fmt: skip
    shares = {"precision": 0.5 if known else None, "recall": None, "false_positive_rate": 0.1 if known else None}
    bias = [
        {"by": by, "value": value, "n": 30, "removed": 4, "poisoned": 6, **shares} for by, value in (("all", ""), ("class", ATTACK), (QUOTED, "F"))
    ]
    columns = {"decided_by": "fvm:utility", "attack": said, "filter": bias, "decision": "threshold that at most 1 % of clean samples exceed"}
    detected(directory, kind, known=known, **(columns | changes))
    samples = pd.read_parquet(directory / "samples.parquet").rename(columns={"mislabelled": "truly_poisoned"})
    samples.assign(poisoned=samples["removed"], harms_utility=False).to_parquet(directory / "samples.parquet")
    worst = json.loads((directory / "worst.json").read_text())
    for entry in worst:
        entry["truly_poisoned"] = entry.pop("mislabelled")
    for name in ("worst.json", "harmful.json"):
        (directory / name).write_text(json.dumps(worst))
    return directory


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def own(page: str) -> str:
    """The page without plotly.js, the one script that is another project's."""
    return page.replace(max(re.findall(r"<script>.*?</script>", page, re.DOTALL), key=len), "")


@pytest.mark.parametrize("kind", ["image", "table", "text"])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("make", [detected, attacked])
def test_values_from_the_data_stay_text(tmp_path: Path, kind: str, known: bool, make: Callable[..., Path]) -> None:
    page = own(render(make(tmp_path, kind, known=known)).read_text())
    assert ATTACK not in page and "<b>" not in re.sub(r'<script type="application/json".*?</script>', "", page)
    assert html.escape(ATTACK, quote=False) in page
    assert html.escape(QUOTED, quote=False).replace("'", "&#39;").replace('"', "&#34;") in page
    assert page.count("</script>") == 2  # the figures' JSON and the page's own script


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    page = own(render(detected(tmp_path)).read_text())
    assert not re.search(r"(?:src|href|url|action)\s*[=(]\s*[\"']?(?!#|data:)[\w/.:]", page)
    assert "https:" not in page and "http:" not in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    (detected(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        render(tmp_path)
    assert not list(tmp_path.glob("*report.html*"))


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        render(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"removed": 59}, "expected 59 removed samples"),
        ({"n_train": 61}, "expected 61 rows"),
        ({"decided_by": "absent"}, "'absent'"),
        ({"kind": "sound"}, "kind: expected image, table or text"),
        ({"accuracy": {"before": 0.9}}, "accuracy.after"),
        ({"accuracy": {"before": 0.9, "after": 95.8}}, "accuracy.after.*from 0 to 1"),
        ({"threshold": "high"}, "threshold"),
        ({"title": None}, "title"),
    ],
)
def test_contradictions_and_malformed_fields_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(detected(tmp_path, **changes))
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", FILES)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str) -> None:
    (detected(tmp_path) / name).write_text("not {")
    with pytest.raises(ValueError, match=name):
        render(tmp_path)


@pytest.mark.parametrize(
    "image",
    [
        "https://example.org/a.png",
        "data:image/svg+xml;base64,AAAA",
        'data:image/png;base64,AAAA" onerror="alert(1)',
        "data:image/png;base64,AAAA",
        png() + "\n",
    ],
)
def test_only_png_data_become_images(tmp_path: Path, image: str) -> None:
    path = detected(tmp_path) / "worst.json"
    worst = json.loads(path.read_text())
    path.write_text(json.dumps([worst[0] | {"image": image}]))
    with pytest.raises(ValueError, match=r"worst.json: \[0\]: image"):
        render(tmp_path)


def test_scores_are_matched_by_id_not_by_position(tmp_path: Path) -> None:
    before = read(detected(tmp_path)).scores["fvm:utility"].to_numpy()
    pd.read_parquet(tmp_path / "scores.parquet").iloc[::-1].to_parquet(tmp_path / "scores.parquet")
    np.testing.assert_array_equal(read(tmp_path).scores["fvm:utility"].to_numpy(), before)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (0.912, 0.958, "raised test accuracy from 91.2 % to 95.8 %."),
        (0.958, 0.912, "lowered test accuracy from 95.8 % to 91.2 %."),
        (0.9121, 0.9119, "left test accuracy at 91.2 %."),
        (0.9, 0.9997, "raised test accuracy from 90.0 % to 99.97 %."),
    ],
)
def test_the_headline_tells_the_truth(tmp_path: Path, before: float, after: float, sentence: str) -> None:
    contents = read(detected(tmp_path, accuracy={"before": before, "after": after}))
    headline = words.headline(contents).replace(words.SPACE, " ")
    assert headline == f"Removing {contents.result['removed']} of 60 samples {sentence}"


def test_the_headline_says_when_nothing_was_removed(tmp_path: Path) -> None:
    samples = pd.read_parquet(detected(tmp_path, removed=0) / "samples.parquet").assign(removed=False)
    samples.to_parquet(tmp_path / "samples.parquet")
    assert words.headline(read(tmp_path)).replace(words.SPACE, " ") == "None of the 60 samples was removed; test accuracy is 91.2 %."
    render(tmp_path)


def test_a_random_removal_that_does_as_well_is_said_so(tmp_path: Path) -> None:
    contents = read(detected(tmp_path, accuracy={"before": 0.9, "after": 0.92, "random": 0.93}))
    assert any("the scores did not help" in sentence for sentence in words.findings(contents))


def test_unknown_truth_is_said_and_not_plotted(tmp_path: Path) -> None:
    page = own(render(detected(tmp_path, known=False)).read_text())
    assert "Truth unknown" in page and "Omitted: precision and recall" in page
    assert charts.checking(read(tmp_path)) is None


def spoken(text: str) -> str:
    return text.replace(words.SPACE, " ")


@pytest.mark.parametrize(
    ("attack", "sentence"),
    [
        ({}, "lowered attack success from 99.0 % to 2.0 %."),
        ({"failed": True, "success": {"scored": 0.1, **dict.fromkeys(("before", "after", "random", "relabelled"), 0.1)}},
         "The suspected attack does not work on this model: its success is 10.0 %."),
    ],
)  # fmt: skip
def test_the_headline_of_an_attack_tells_of_the_attack(tmp_path: Path, attack: dict[str, object], sentence: str) -> None:
    contents = read(attacked(tmp_path, attack=attack))
    assert sentence in spoken(words.headline(contents))
    render(tmp_path)


def test_the_verdicts_are_told_apart(tmp_path: Path) -> None:
    contents = read(attacked(tmp_path))
    first, second = words.verdicts(contents)
    assert [row["estimator"] for row in first["rows"]] == ["fvm"] and len(second["rows"]) == 2
    assert "12 samples" in spoken(first["said"][0]) and "at most 1.0 % of clean samples" in spoken(first["said"][1])
    assert "3 samples, 1 of them also called poisoned. Nothing was removed by this verdict." in spoken(second["said"][0])
    page = own(render(tmp_path).read_text())
    assert "mislabelled" not in re.sub(r'<script type="application/json".*?</script>', "", page) and "truly poisoned" in page
    assert words.bias(contents)[1]["name"] == f"Class {ATTACK}" and words.bias(contents)[0]["recall"] == "–"


@pytest.mark.parametrize(
    ("success", "oracle", "shared", "sentences"),
    [
        (0.02, 0.0, False, ["5 triggered inputs", "that no score had seen"]),
        (0.4, 0.0, True, ["so poison is left in the data.", "the very ones that the scores had seen"]),
        (0.4, None, False, ["so poison is left in the data, or such inputs look like the goal class by themselves."]),
        (0.4, 0.4, False, ["What success there still is comes without poison"]),
    ],
)
def test_what_is_left_of_an_attack_and_where_it_was_measured_is_said(
    tmp_path: Path, success: float, oracle: float | None, shared: bool, sentences: list[str]
) -> None:
    shares = {"before": 0.99, "after": success, "random": 0.98, "oracle": oracle, "relabelled": 0.5, "scored": 0.99}
    text = spoken(" ".join(words.findings(read(attacked(tmp_path, attack={"success": shares, "shared": shared})))))
    assert all(sentence in text for sentence in sentences)
    assert ("still works" in text) == (success > words.LEFT and success != oracle)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ({"goal_class": 3}, "attack.goal_class: expected str"),
        ({"failed": None}, "attack.failed: expected bool"),
        ({"success": {"before": 0.9}}, "attack.success.after: expected a share"),
        ({"success_runs": {"before": [2]}}, "attack.success_runs.before: expected shares"),
    ],
)
def test_a_malformed_attack_is_named(tmp_path: Path, attack: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(attacked(tmp_path, attack=attack))
    assert not (tmp_path / "report.html").exists()


def test_a_malformed_filter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="result.json: filter: expected a list of objects"):
        render(attacked(tmp_path, filter=[{"by": "all"}]))


def test_tied_scores_find_what_chance_finds() -> None:
    truth = np.arange(10) < 5
    np.testing.assert_allclose(charts.expected_hits(np.zeros(10), truth), np.arange(11) / 2)
    np.testing.assert_allclose(charts.expected_hits(-np.arange(10.0), truth), np.minimum(np.arange(11), 5))


def heights(chart: charts.Chart) -> list[np.ndarray]:
    """The bars' heights, a panel each; Plotly writes arrays as lists or, from version 6 on, as base64."""
    ys = [trace["y"] for trace in chart.figure["data"] if trace["type"] == "bar"]
    return [np.frombuffer(base64.b64decode(y["bdata"]), y["dtype"]) if isinstance(y, dict) else np.array(y) for y in ys]


def test_no_bar_of_the_histogram_mixes_removed_and_kept(tmp_path: Path) -> None:
    contents = read(detected(tmp_path, known=False))
    removed, kept = heights(charts.scores(contents, "fvm:utility"))
    assert removed.sum() + kept.sum() == N
    assert not ((removed > 0) & (kept > 0)).any()


SHAPES = [np.zeros(N), np.full(N, 3.0), np.r_[np.zeros(N - 1), 1e9], np.linspace(1e-9, 2e-9, N), -np.geomspace(1e-6, 1e6, N)]


@pytest.mark.parametrize("values", SHAPES)
def test_every_shape_of_scores_is_drawn_whole(tmp_path: Path, values: np.ndarray) -> None:
    frame = pd.read_parquet(detected(tmp_path) / "scores.parquet").assign(loss=values)
    frame.to_parquet(tmp_path / "scores.parquet")
    assert sum(bars.sum() for bars in heights(charts.scores(read(tmp_path), "loss"))) == N


CHROMIUM = os.environ.get("ROBUST_IF_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs the package playwright")
    if not CHROMIUM:
        pytest.skip("the browser test needs Chromium: install it or set ROBUST_IF_CHROMIUM to its executable")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.mark.parametrize(
    ("make", "kind", "known", "drawn"),
    [
        (detected, "image", True, 4),
        (detected, "table", True, 4),
        (detected, "text", False, 2),
        (attacked, "image", True, 5),
        (attacked, "text", False, 3),
    ],
)
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_works_offline_in_a_browser(
    tmp_path: Path, browser, make: Callable[..., Path], kind: str, known: bool, drawn: int, width: int, scheme: str
) -> None:
    path = render(make(tmp_path, kind, known=known))
    page = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
    trouble, requests = [], []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_function(f"document.querySelectorAll('.js-plotly-plot').length === {drawn}")
    assert page.locator(".js-plotly-plot .main-svg").count() >= drawn
    assert page.locator(".labels", has_text=ATTACK).count() > 0
    narrow = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    assert page.evaluate(narrow)

    note = page.locator("#scores-note").inner_text()
    page.get_by_label("Scores of").select_option("scores-1")
    assert page.locator("#scores-note").inner_text() != note
    for details in page.locator("summary").all()[:3]:
        details.click()
    assert page.evaluate(narrow)
    if kind == "image":
        assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth === 8 && image.alt)")
    page.close()
    assert not trouble
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
