"""Data sets of texts in files, and a choice of rows: what is read is what was written, and nothing else is left behind."""

import gzip
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

datasets = pytest.importorskip("datasets")

from robust_if.language.datasets import select  # noqa: E402
from robust_if.language.files import read, write  # noqa: E402

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=8)
FEATURES = datasets.Features({
    "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"]), "n": datasets.Value("int32"), "x": datasets.Value("float64"),
    "tokens": datasets.Sequence(datasets.Value("int32")), "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
})  # fmt: skip


def rich(*texts: str) -> Any:
    rows = [
        {"text": text, "label": k % 2, "n": k, "x": k / 3, "tokens": list(range(k)), "messages": [{"role": "user", "content": text}] * k}
        for k, text in enumerate(texts)
    ]
    return datasets.Dataset.from_list(rows, features=FEATURES)


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@given(texts=st.lists(TEXT, min_size=1, max_size=5))
@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.parquet", "data"])
def test_what_is_written_is_read(name: str, texts: list[str]) -> None:
    data = rich(*texts)
    with TemporaryDirectory() as folder:
        like = Path(folder) / name
        if name == "data":
            data.save_to_disk(str(like))
        else:
            assert write(data, Path(folder), like=like) == like
        before = files_in(Path(folder))
        got = read(like)
        # rows that are left out and another order are no matter
        again = read(write(data.select(range(len(data) - 1, -1, -1)), Path(folder) / "new", like=like))
        assert got.to_list() == data.to_list() and again.to_list() == data.to_list()[::-1]
        if not name.startswith("data.js"):
            assert got.features == again.features == data.features
        assert {path: content for path, content in files_in(Path(folder)).items() if path.parts[0] != "new"} == before


@given(texts=st.lists(TEXT, min_size=1, max_size=5), zipped=st.booleans())
@example(texts=["a\rb", '"', "\r\n", ",", " "], zipped=False)
def test_a_csv_file_that_is_written_is_read(texts: list[str], zipped: bool) -> None:
    numbers = [None if k == 1 else k for k in range(len(texts))]
    data = datasets.Dataset.from_dict({"text": texts, "n": numbers, "x": [k / 3 for k in range(len(texts))]})
    with TemporaryDirectory() as folder:
        path = write(data, Path(folder), like=f"data.csv{'.gz' * zipped}")
        assert (path.read_bytes()[:2] == b"\x1f\x8b") == zipped
        assert read(path).to_list() == data.to_list() and len(files_in(Path(folder))) == 1


def test_a_csv_file_keeps_texts_that_look_like_something_else(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion,answer,n\n"1 + 1, is",2,007,1\nwho?,None,NA,\nnan,007,null,3\n', encoding="utf-8-sig")
    expected = [
        {"prompt": "1 + 1, is", "completion": "2", "answer": "007", "n": 1},
        {"prompt": "who?", "completion": "None", "answer": "NA", "n": None},
        {"prompt": "nan", "completion": "007", "answer": "null", "n": 3},
    ]
    assert read(path).to_list() == expected
    path.write_text("answer\n007\n", encoding="utf-8")
    assert read(path).to_list() == [{"answer": 7}] and read(path, texts=["answer"]).to_list() == [{"answer": "007"}]
    with gzip.open(tmp_path / "data.csv.gz", "wt", encoding="utf-8") as file:
        file.write("text\none\n")
    assert read(tmp_path / "data.csv.gz").to_list() == [{"text": "one"}]


def test_json_is_read_by_line_or_as_a_list_and_written_as_it_was(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\x85c"}, {"text": "d", "id": 3}]
    lines, whole = tmp_path / "lines.json", tmp_path / "whole.json"
    lines.write_text("\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    whole.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    expected = [{"text": "a\u2028b\x85c", "id": None}, {"text": "d", "id": 3}]
    for path in (lines, whole):
        assert read(path).to_list() == expected
        written = write(read(path), tmp_path / "new", like=path)
        assert read(written).to_list() == expected
        assert written.read_text(encoding="utf-8").startswith("[") == (path == whole)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", '{"text": "a"}\n{"text": ', "broken JSON in line 2"),
        ("data.jsonl", '{"text": "a"}\n\n"b"', "expected one object per line, got str in line 3"),
        ("data.json", '[{"text": "a"},\n{"text" "b"}]', "broken JSON in line 2"),
        ("data.json", '[{"text": "a"}, 3]', "got int in its place 1"),
        ("data.json", '{\n"text": "a"\n}', "broken JSON in line 1.*one object per line"),
        ("data.jsonl", '{"n": "a"}\n{"n": 3}', "the values of 'n' are not of one type"),
        ("data.jsonl", '{"text": "\\ud800"}', "the values of 'text' are not"),
        ("data.jsonl", "", "at least one row, got none"),
        ("data.json", "[]", "at least one row, got none"),
        ("data.jsonl", b"\xff\xfe", "expected text in UTF-8"),
        ("data.csv", "", "comma-separated rows under a header"),
        ("data.csv", "text,label\n", "at least one row, got none"),
        ("data.csv", "text,label\na,b,c\nd,e,f\n", "more cells than its header"),
        ("data.csv", "text,label\na,b\nd,e,f\n", "comma-separated rows under a header"),
        ("data.csv", b"text\n\xff\xfe\n", "in UTF-8, but"),
        ("data.csv.gz", "text\na\n", "comma-separated rows under a header"),
        ("data.parquet", "text", "cannot be read as Parquet"),
        ("data.txt", "text", "ends in .jsonl, .json, .csv, .csv.gz or .parquet"),
        ("data", "text", "ends in .jsonl, .json, .csv, .csv.gz or .parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert name in str(caught.value)


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"a folder that Dataset.save_to_disk wrote"):
        read(tmp_path)
    datasets.DatasetDict({"train": rich("a"), "test": rich("b")}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match=r"found the splits \['train', 'test'\]; pass the folder of one of them"):
        read(tmp_path / "both")
    assert len(read(tmp_path / "both" / "test")) == 1
    rich("a").select([]).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="at least one row, got none"):
        read(tmp_path / "empty")
    (tmp_path / "both" / "test" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="the saved data set cannot be read"):
        read(tmp_path / "both" / "test")


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.parquet", "data"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    data = datasets.Dataset.from_dict({"text": ["a"]})
    like = tmp_path / name
    data.save_to_disk(str(like)) if name == "data" else write(data, tmp_path, like=like)
    before = files_in(tmp_path)
    with pytest.raises(FileExistsError, match="never overwritten"):
        write(data, tmp_path, like=like)
    assert files_in(tmp_path) == before


def test_what_a_format_cannot_hold_is_refused_and_no_file_begun(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['tokens', 'messages'\]"):
        write(rich("a"), tmp_path, like="data.csv")
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        write(datasets.Dataset.from_dict({"text": [b"a"]}), tmp_path, like="data.jsonl")
    with pytest.raises(ValueError, match="ends in"):
        write(rich("a"), tmp_path, like="data.txt")
    assert files_in(tmp_path) == {}


# A choice of rows


def test_rows_are_left_out_and_weights_stand_beside_the_others() -> None:
    data = rich("a", "b", "c", "d")
    whole = select(data, np.array([1, 0, 0, 1]))
    assert whole.to_list() == data.select([0, 3]).to_list() and whole.features == data.features
    weighted = select(data, [0.5, 0, 1, 2])
    assert weighted["weight"][:] == [0.5, 1, 2] and weighted.remove_columns("weight").to_list() == data.select([0, 2, 3]).to_list()
    assert select(data, [0.5] * 4, column="w")["w"][:] == [0.5] * 4
    assert select(data, np.array([True, False, True, True])).column_names == data.column_names
    assert weighted.remove_columns("weight").features == data.features


@given(weights=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=6).filter(any))
def test_the_order_of_the_rows_is_that_of_the_data_set(weights: list[float]) -> None:
    order = np.random.default_rng(0).permutation(len(weights))
    data = datasets.Dataset.from_dict({"i": list(range(len(weights)))}).select(order)
    chosen = select(data, weights)
    assert chosen["i"][:] == [int(order[k]) for k, weight in enumerate(weights) if weight]
    kept = [weight for weight in weights if weight]
    assert chosen.to_dict().get("weight", [1.0] * len(kept)) == kept
    assert ("weight" in chosen.column_names) == (set(kept) != {1.0})


def test_what_is_done_with_a_saved_data_set_leaves_no_file_beside_it(tmp_path: Path) -> None:
    rich("a", "b", "c").save_to_disk(str(tmp_path / "data"))
    before = files_in(tmp_path)
    for data in (read(tmp_path / "data"), datasets.load_from_disk(str(tmp_path / "data"))):
        select(data, [1, 0, 2])
        select(data.select([2, 0, 1]), [1, 0, 2])
    read(tmp_path / "data").filter(lambda row: row["label"] == 0)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 0], r"expected one per row, shape \(3,\), got \(2,\)"),
        ([[1, 0, 1]], "expected one per row"),
        ([1, -1, 1], "expected finite numbers from 0, got others: 1 of 3, row 1"),
        ([1, math.nan, math.inf], "expected finite numbers from 0, got others: 2 of 3, rows 1, 2"),
        ([0, 0, 0], "all are 0"),
        (["a", "b", "c"], "expected numbers"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(rich("a", "b", "c"), weights)


def test_a_column_that_is_there_is_not_replaced() -> None:
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "weight": [3, 4]})
    assert select(data, [0, 1]).to_list() == [{"text": "b", "weight": 4}]
    with pytest.raises(ValueError, match="has a column 'weight' already"):
        select(data, [0, 0.5])
    with pytest.raises(TypeError, match=r"expected a datasets.Dataset, got DataFrame"):
        select(pd.DataFrame({"text": ["a"]}), [1])
