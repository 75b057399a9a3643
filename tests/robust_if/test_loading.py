"""Files are read as they stand, written back in their own format, and encoded by rules of the training set alone."""

import gzip
import importlib
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from robust_if.encoding import Encoder, check_split
from robust_if.loading import read

PNG = np.random.default_rng(0).integers(0, 256, (6, 4, 5), dtype=np.uint8)
CSV = """name,age,city,id,label,true
a,1.50,Rome,p1,01,1
b,,Rome,p2,2,2
c,3.0,NA,p3,01,2
"d, e",4,Oslo,p4,2,2
"""


def csv(folder: Path, text: str = CSV, name: str = "people.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def images_file(folder: Path, images: np.ndarray = PNG, *, suffix: str = "", name: str = "train", labels: int | None = None) -> Path:
    write = (lambda path, content: path.write_bytes(gzip.compress(content))) if suffix else (lambda path, content: path.write_bytes(content))
    n = len(images) if labels is None else labels
    path = folder / f"{name}-images-idx3-ubyte{suffix}"
    write(path, struct.pack(">4B3I", 0, 0, 8, 3, *images.shape) + images.tobytes())
    write(folder / f"{name}-labels-idx1-ubyte{suffix}", struct.pack(">4BI", 0, 0, 8, 1, n) + bytes(i % 2 for i in range(n)))
    return path


def image_folder(folder: Path, colour: bool = False) -> Path:
    pillow = pytest.importorskip("PIL.Image")
    root = folder / "pets"
    for i, image in enumerate(PNG):
        place = root / ("cat" if i % 2 == 0 else "dog") / f"{i // 2}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        pillow.fromarray(np.stack([image] * 3, -1) if colour else image).save(place)
    return root


def npz(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


def same_features(left: object, right: object) -> bool:
    return left.equals(right) if isinstance(left, pd.DataFrame) else bool(np.array_equal(left, right))


def clean(dataset, folder: Path, *, relabel: dict, **names):
    """Write without the second sample and with the labels of ``relabel`` (by position), and read the copy."""
    keep = np.ones(len(dataset), bool)
    keep[1] = False
    labels = dataset.labels.copy()
    for position, label in relabel.items():
        labels[position] = label
    copy = read(dataset.write(folder / "clean", keep, labels), **names)
    assert copy.labels.tolist() == labels[keep].tolist()
    assert same_features(copy.features, dataset.take(keep).features)
    return copy


# Round trips


@pytest.mark.parametrize("name", ["people.csv", "people.csv.gz"])
def test_a_cleaned_csv_keeps_its_columns_ids_and_spelling(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(CSV.encode()) if name.endswith("gz") else CSV.encode())
    dataset = read(path, truth="true")
    assert dataset.kind == "table" and list(dataset.features) == ["name", "age", "city"]
    assert dataset.labels.tolist() == [1, 2, 1, 2] and dataset.ids.tolist() == ["p1", "p2", "p3", "p4"]
    assert dataset.mislabelled.tolist() == [False, False, True, False]
    copy = clean(dataset, tmp_path, relabel={2: 2}, truth="true")
    assert copy.ids.tolist() == ["p1", "p3", "p4"] and not copy.mislabelled.any()
    content = copy.path.read_bytes()
    text = (gzip.decompress(content) if name.endswith("gz") else content).decode()
    assert text == 'name,age,city,id,label,true\na,1.50,Rome,p1,01,1\nc,3.0,NA,p3,2,2\n"d, e",4,Oslo,p4,2,2\n'


def test_csv_cells_with_line_breaks_and_two_spellings_of_a_label_stay(tmp_path):
    text = 'x,y\n"a\nb",1\n\nc,01\nd,2\n'
    dataset = read(csv(tmp_path, text))
    path = dataset.write(tmp_path / "clean", np.ones(3, bool), [1, 1, 2])
    assert path.read_text() == text.replace("\n\n", "\n")


def test_a_subset_writes_its_own_rows(tmp_path):
    dataset = read(csv(tmp_path)).take([3, 0])
    copy = read(dataset.write(tmp_path / "clean", [True, True], [1, 1]))
    assert copy.ids.tolist() == ["p4", "p1"] and copy.labels.tolist() == [1, 1]


def test_a_cleaned_parquet_keeps_its_schema(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    frame = pd.DataFrame({"y": pd.Categorical(["no", "yes", "no", "yes"]), "x": [1, 2, 3, 4], "bad": [True, False, False, False]}, index=[9, 8, 7, 6])
    frame.to_parquet(tmp_path / "t.parquet")
    dataset = read(tmp_path / "t.parquet", truth="bad")
    assert list(dataset.features) == ["x"] and dataset.ids.tolist() == [0, 1, 2, 3] and dataset.mislabelled.tolist() == [True, False, False, False]
    copy = clean(dataset, tmp_path, relabel={0: "yes"}, truth="bad")
    assert parquet.read_schema(copy.path).equals(parquet.read_schema(tmp_path / "t.parquet"))
    assert pd.read_parquet(copy.path).index.tolist() == [9, 7, 6]


@pytest.mark.parametrize(
    ("x", "kind", "shape"),
    [
        (PNG, "image", (6, 1, 4, 5)),
        (np.stack([PNG.repeat(2, axis=1)] * 3, -1), "image", (6, 3, 8, 5)),
        (np.stack([PNG] * 3, 1) / 255, "image", (6, 3, 4, 5)),
        (np.linspace(-2, 2, 12).reshape(6, 2), "table", (6, 2)),
        (np.arange(6), "table", (6, 1)),
        (np.array([f"word {i}" for i in range(6)]), "text", (6, 1)),
    ],
)
def test_a_cleaned_archive_keeps_its_arrays(tmp_path, x, kind, shape):
    path = npz(tmp_path, X=x, y=np.array([[0], [1], [0], [1], [0], [1]], np.uint8), ids=np.arange(10, 16), truth=np.zeros(6, int), mean=np.ones(3))
    dataset = read(path, truth="truth")
    assert dataset.kind == kind and dataset.features.shape == shape
    assert dataset.mislabelled.tolist() == [False, True] * 3
    copy = clean(dataset, tmp_path, relabel={3: 0}, truth="truth")
    assert copy.ids.tolist() == [10, 12, 13, 14, 15]
    with np.load(copy.path) as archive:
        assert archive["y"].dtype == np.uint8 and archive["y"].shape == (5, 1) and archive["mean"].shape == (3,)
        assert archive["X"].dtype == x.dtype and archive.files == ["X", "y", "ids", "truth", "mean"]
    with pytest.raises(ValueError, match=r"labels: expected values that the file's type uint8 can hold, got \[256\]"):
        dataset.write(tmp_path / "other", np.ones(6, bool), np.full(6, 256))


def test_a_cleaned_archive_of_words_stays_compressed_and_holds_longer_labels(tmp_path):
    np.savez_compressed(tmp_path / "w.npz", x=np.zeros((3, 400)), labels=np.array(["a", "b", "a"]))
    dataset = read(tmp_path / "w.npz")
    path = dataset.write(tmp_path / "clean", [True, True, False], ["longer", "b", "a"])
    assert read(path).labels.tolist() == ["longer", "b"] and path.stat().st_size < 2000


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_cleaned_idx_pair_is_an_idx_pair(tmp_path, suffix):
    dataset = read(images_file(tmp_path, suffix=suffix))
    assert dataset.features.shape == (6, 1, 4, 5) and dataset.features.dtype == np.float32
    np.testing.assert_allclose(dataset.features[:, 0] * 255, PNG, rtol=1e-6)
    copy = clean(dataset, tmp_path, relabel={0: 7})
    assert (copy.path.read_bytes()[:2] == b"\x1f\x8b") == bool(suffix)
    assert sorted(file.name for file in copy.path.parent.iterdir()) == sorted(file.name for file in tmp_path.glob("train*"))
    assert len(read(copy.path.parent)) == 5


@pytest.mark.parametrize("colour", [False, True])
def test_a_cleaned_image_folder_moves_the_corrected_files(tmp_path, colour):
    dataset = read(image_folder(tmp_path, colour))
    assert dataset.ids.tolist() == ["cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png"]
    assert dataset.features.shape == (6, 3 if colour else 1, 4, 5)
    np.testing.assert_allclose(dataset.features[:, 0] * 255, PNG[[0, 2, 4, 1, 3, 5]], rtol=1e-6)
    keep = np.array([True, True, False, True, False, True])
    path = dataset.write(tmp_path / "clean", keep, ["dog", "dog", "cat", "dog", "dog", "dog"])
    copy = read(path)
    assert path == tmp_path / "clean" / "pets"
    assert copy.ids.tolist() == ["dog/0.png", "dog/1.png", "dog/2.png", "dog/cat_0.png"]
    np.testing.assert_array_equal(copy.features, dataset.features[[3, 1, 5, 0]])


def test_a_cleaned_hugging_face_table_keeps_its_features(tmp_path):
    datasets = pytest.importorskip("datasets")
    value, classes = datasets.Value, datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": value("string"), "label": classes, "id": value("int32"), "gold": value("int8")})
    columns = {"text": [f"a fine day {i}" for i in range(6)], "label": [0, 1] * 3, "id": list(range(5, 11)), "gold": [0, 1, 1, 1, 0, 1]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "hf")
    before = sorted(file.name for file in (tmp_path / "hf").iterdir())
    dataset = read(tmp_path / "hf", truth="gold")
    assert dataset.kind == "text" and dataset.labels.tolist() == ["neg", "pos"] * 3
    assert dataset.mislabelled.tolist() == [False, False, True, False, False, False]
    copy = clean(dataset, tmp_path, relabel={2: "pos"}, truth="gold")
    assert copy.ids.tolist() == [5, 7, 8, 9, 10] and datasets.load_from_disk(copy.path).features == features
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == before
    with pytest.raises(ValueError, match=r"labels: expected one of the data set's classes \['neg', 'pos'\], got 'maybe'"):
        dataset.write(tmp_path / "other", np.ones(6, bool), ["maybe"] * 6)


def test_a_cleaned_hugging_face_image_set_keeps_its_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    pillow = pytest.importorskip("PIL.Image")
    columns = {"image": [pillow.fromarray(image) for image in PNG], "label": ["a", "b"] * 3, "note": list("uvwxyz")}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "hf")
    dataset = read(tmp_path / "hf")
    assert dataset.kind == "image" and dataset.features.shape == (6, 1, 4, 5)
    np.testing.assert_allclose(dataset.features[:, 0] * 255, PNG, rtol=1e-6)
    copy = clean(dataset, tmp_path, relabel={0: "b"})
    assert datasets.load_from_disk(copy.path)["note"][:] == list("uwxyz")


# Features that changed


def square(features: np.ndarray, rows: list[int]) -> np.ndarray:
    """A patch in the corner of some images."""
    features = features.copy()
    features[rows, :, -2:, -2:] = 0.41
    return features


def test_changed_images_are_written_and_the_others_stay_as_they_are(tmp_path):
    colour = np.random.default_rng(1).integers(0, 256, (6, 3, 8, 5), dtype=np.uint8)
    arrays = (
        PNG,
        PNG.repeat(2, axis=1)[..., None],
        colour,
        colour.transpose(0, 2, 3, 1),
        PNG / 255,
        (PNG / 255).astype(np.float16),
        PNG.astype(np.int64),
    )
    for i, x in enumerate(arrays):
        (tmp_path / str(i)).mkdir()
        dataset = read(npz(tmp_path / str(i), x=x, y=np.arange(6) % 2, ids=np.arange(10, 16)))
        stamped = dataset.with_features(square(dataset.features, [0, 2, 5]))
        assert stamped.changed.tolist() == [True, False, True, False, False, True] and not dataset.changed.any()
        keep, labels = np.array([True, True, True, False, True, True]), np.array([1, 1, 1, 1, 0, 0])
        copy = read(stamped.write(tmp_path / str(i) / "copy", keep, labels))
        np.testing.assert_allclose(copy.features, stamped.features[keep], atol=0.51 / 255 if x.dtype.kind in "iu" else 1e-3)
        assert copy.labels.tolist() == labels[keep].tolist() and copy.ids.tolist() == stamped.renamed(keep, labels).tolist() == [10, 11, 12, 14, 15]
        with np.load(copy.path) as archive:
            assert archive["x"].dtype == x.dtype
            np.testing.assert_array_equal(archive["x"][[1, 3]], x[[1, 4]])


def test_a_pixel_that_the_type_of_an_archive_cannot_hold_is_refused(tmp_path):
    dataset = read(npz(tmp_path, x=PNG.astype(np.int8) & 127, y=np.arange(6) % 2))
    white = dataset.with_features(np.ones_like(dataset.features))
    with pytest.raises(ValueError, match="x: int8 holds pixels up to 127, got 255; save the images as uint8"):
        white.write(tmp_path / "copy", np.ones(6, bool), dataset.labels)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_changed_idx_images_are_written(tmp_path, suffix):
    path = images_file(tmp_path, suffix=suffix)
    dataset = read(path)
    stamped = dataset.with_features(square(dataset.features, [0, 2, 5])).take([5, 4, 2, 0])
    copy = read(stamped.write(tmp_path / "copy", np.ones(4, bool), [7, 0, 0, 0]))
    np.testing.assert_allclose(copy.features, stamped.features, atol=0.51 / 255)
    np.testing.assert_array_equal(copy.features[1], dataset.features[4])
    assert copy.labels.tolist() == [7, 0, 0, 0] and stamped.renamed(np.ones(4, bool), [7, 0, 0, 0]).tolist() == [0, 1, 2, 3]
    same = dataset.write(tmp_path / "same", np.ones(6, bool), dataset.labels)
    unpacked = gzip.decompress if suffix else bytes
    assert unpacked(same.read_bytes()) == unpacked(path.read_bytes())


@pytest.mark.parametrize("colour", [False, True])
def test_changed_files_become_png_and_the_others_are_copied(tmp_path, colour):
    root = image_folder(tmp_path, colour)
    jpg = root / "cat" / "0.jpg"
    pytest.importorskip("PIL.Image").open(root / "cat" / "1.png").save(jpg)
    jpg.rename(root / "cat" / "3.jpg")
    pytest.importorskip("PIL.Image").open(root / "cat" / "1.png").save(jpg)
    dataset = read(root)
    assert dataset.ids.tolist() == ["cat/0.jpg", "cat/0.png", "cat/1.png", "cat/2.png", "cat/3.jpg", "dog/0.png", "dog/1.png", "dog/2.png"]
    stamped = dataset.with_features(square(dataset.features, [0, 2, 4]))
    keep = np.arange(8) != 3
    labels = np.array(["cat", "cat", "cat", "cat", "dog", "dog", "dog", "cat"])
    copy = read(stamped.write(tmp_path / "copy", keep, labels))
    new = stamped.renamed(keep, labels)
    # a changed .jpg becomes a .png and gives way to the file that has the name already, and so does an image that moves
    assert new.tolist() == ["cat/cat_0.png", "cat/0.png", "cat/1.png", "dog/3.png", "dog/0.png", "dog/1.png", "cat/2.png"]
    at = [copy.ids.tolist().index(name) for name in new]
    np.testing.assert_allclose(copy.features[at], stamped.features[keep], atol=0.51 / 255)
    assert sorted(copy.ids) == sorted(new) and copy.labels[at].tolist() == labels[keep].tolist()
    assert (copy.path / "dog/1.png").read_bytes() == (root / "dog/1.png").read_bytes()


@pytest.mark.parametrize("name", ["people.csv", "people.csv.gz"])
def test_only_the_changed_cells_of_a_csv_change(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(CSV.encode()) if name.endswith("gz") else CSV.encode())
    dataset = read(path, truth="true")
    features = dataset.features.copy()
    features.loc[3, "age"] = 1.5  # spelt as the file spells it
    features.loc[2, "age"] = np.nan
    features.loc[1, "city"] = 'Bonn, "am Rhein"'
    changed = dataset.with_features(features)
    assert changed.changed.sum(0).tolist() == [0, 2, 1] and changed.changed[:, 1].tolist() == [False, False, True, True]
    copy = read(changed.write(tmp_path / "copy", np.ones(4, bool), [2, 2, 1, 2]), truth="true")
    content = copy.path.read_bytes()
    text = (gzip.decompress(content) if name.endswith("gz") else content).decode()
    assert text == 'name,age,city,id,label,true\na,1.50,Rome,p1,2,1\nb,,"Bonn, ""am Rhein""",p2,2,2\nc,,NA,p3,01,2\n"d, e",1.50,Oslo,p4,2,2\n'
    assert same_features(copy.features, changed.features) and copy.ids.tolist() == changed.renamed(np.ones(4, bool), [2, 2, 1, 2]).tolist()


def test_changed_cells_follow_their_samples_and_row_numbers_start_afresh(tmp_path):
    dataset = read(csv(tmp_path, "x,y\n1,a\n2,b\n3,a\n4,b\n"))
    changed = dataset.with_features(dataset.features.assign(x=[1, 2, 3, 40]))
    changed = changed.with_features(changed.features.assign(x=[1, 20, 3, 40])).take([3, 0, 1])
    keep = np.array([True, False, True])
    copy = read(changed.write(tmp_path / "copy", keep, changed.labels))
    assert copy.path.read_text() == "x,y\n40,b\n20,b\n" and changed.renamed(keep, changed.labels).tolist() == copy.ids.tolist() == [0, 1]


def test_changed_cells_of_a_parquet_keep_its_schema_and_the_other_cells(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    table = pyarrow.table(
        {
            "big": pyarrow.array([2**60 + 1, None, 3, 4]),
            "kind": pyarrow.array(["u", "v", None, "u"]).dictionary_encode(),
            "day": pyarrow.array([0, 1, 2, None], pyarrow.date32()),
            "y": pyarrow.array([0, 1, 0, 1], pyarrow.int8()),
        }
    )
    parquet.write_table(table, tmp_path / "t.parquet")
    dataset = read(tmp_path / "t.parquet")
    features = dataset.features.copy()
    features.loc[3, "big"], features.loc[2, "kind"] = 7, "v"
    changed = dataset.with_features(features)
    copy = changed.write(tmp_path / "copy", np.ones(4, bool), [1, 1, 0, 1])
    new = parquet.read_table(copy)
    assert new.schema.equals(table.schema) and new["day"].equals(table["day"]) and new["y"].to_pylist() == [1, 1, 0, 1]
    assert new["big"].to_pylist() == [2**60 + 1, None, 3, 7] and new["kind"].to_pylist() == ["u", "v", "v", "u"]
    assert same_features(read(copy).features, features)
    features.loc[3, "big"] = 0.5
    with pytest.raises(ValueError, match="expected values that a column of type int64 can hold: Float value 0.5"):
        dataset.with_features(features).write(tmp_path / "other", np.ones(4, bool), dataset.labels)


@pytest.mark.parametrize("x", [np.arange(12.0).reshape(6, 2), np.arange(6, dtype=np.uint8), np.array([f"word {i}" for i in range(6)])])
def test_changed_numbers_and_words_of_an_archive_are_written(tmp_path, x):
    dataset = read(npz(tmp_path, x=x, y=np.arange(6) % 2))
    features = dataset.features.copy()
    features.loc[[1, 4], features.columns[-1]] = "a word that is longer" if x.dtype.kind == "U" else 200
    changed = dataset.with_features(features)
    copy = read(changed.write(tmp_path / "copy", np.arange(6) != 3, dataset.labels))
    assert changed.changed.sum() == 2 and same_features(copy.features, changed.take(np.arange(6) != 3).features)
    with np.load(copy.path) as archive:
        assert archive["x"].dtype.kind == x.dtype.kind and archive["x"].shape == (5, *x.shape[1:])
        np.testing.assert_array_equal(archive["x"][[0, 2]], x[[0, 2]])


def test_changed_cells_and_images_of_a_hugging_face_set_are_written(tmp_path):
    datasets, pillow = pytest.importorskip("datasets"), pytest.importorskip("PIL.Image")
    classes = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"]), "text": datasets.Value("string"), "n": datasets.Value("int32")})
    columns = {"label": [0, 1] * 3, "text": [f"a fine day {i}" for i in range(6)], "n": list(range(6))}
    datasets.Dataset.from_dict(columns, features=classes).save_to_disk(tmp_path / "table")
    dataset = read(tmp_path / "table")
    changed = dataset.with_features(dataset.features.assign(text=[*columns["text"][:5], "rain"], n=np.array([9, *range(1, 6)], np.int32)))
    copy = read(changed.write(tmp_path / "copy", np.arange(6) != 1, ["yes", *dataset.labels[1:]]))
    assert datasets.load_from_disk(copy.path).features == classes and copy.labels.tolist() == ["yes", "no", "yes", "no", "yes"]
    assert same_features(copy.features, changed.take(np.arange(6) != 1).features)
    for i, image in enumerate(PNG):
        pillow.fromarray(image).save(tmp_path / f"{i}.png", compress_level=0)
    pictures = {"image": [str(tmp_path / f"{i}.png") for i in range(6)], "label": ["a", "b"] * 3, "note": list("uvwxyz")}
    datasets.Dataset.from_dict(pictures).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "images")
    dataset = read(tmp_path / "images")
    stamped = dataset.with_features(square(dataset.features, [0, 2, 5]))
    copy = read(stamped.write(tmp_path / "copy", np.arange(6) != 1, dataset.labels))
    np.testing.assert_allclose(copy.features, stamped.take(np.arange(6) != 1).features, atol=0.51 / 255)
    files = [datasets.load_from_disk(path).data.column("image").to_pylist() for path in (dataset.path, copy.path)]
    assert files[0][3:5] == files[1][2:4] and datasets.load_from_disk(copy.path)["note"][:] == list("uwxyz")


def test_no_samples_can_be_given_features_and_labels(tmp_path):
    for dataset in (read(csv(tmp_path)).take([]), read(npz(tmp_path, x=PNG, y=np.arange(6) % 2)).take([])):
        same = dataset.with_features(dataset.features).with_labels([])
        assert len(same) == 0 and same.labels.dtype == dataset.labels.dtype and same.changed.size == 0


def test_features_that_do_not_fit_are_refused(tmp_path):
    table, images = read(csv(tmp_path)), read(npz(tmp_path, x=PNG, y=np.arange(6) % 2))
    for features, message in [
        (table.features[["age", "name", "city"]], r"4 rows with the columns|4 rows of \['age', 'name', 'city'\]"),
        (table.features.iloc[:3], "expected a data frame of 4 rows .* got 3 rows"),
        (images.features, r"expected a data frame of 4 rows .* got ndarray of shape \(6, 1, 4, 5\)"),
        (table.features.assign(age=1), "column 'age' is float64 in the file, got int64"),
        (table.features.assign(city=1.5), "column 'city' is .* in the file, got float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            table.with_features(features)
    for features, message in [
        (images.features[:5], r"expected images as an array, float32 of shape \(6, 1, 4, 5\), got float32 of shape \(5, 1, 4, 5\)"),
        (images.features.astype(float), "got float64 of shape"),
        (table.features, "got DataFrame"),
        (images.features + 1, "expected pixels from 0 to 1, got some from"),
        (images.features * np.nan, "expected pixels from 0 to 1, got some from nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            images.with_features(features)


# What a file may not be


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("", {}, "the file is empty"),
        ("x,label\n", {}, "it holds no sample"),
        ("x,z\n1,2\n", {}, r"label: expected one of label, labels, .* found none of them; .* the file has \['x', 'z'\]"),
        ("x,y,class\n1,2,3\n", {}, r"label: expected one of .* found \['y', 'class'\]; name the one"),
        ("x,y\n1,2\n", {"label": "q"}, r"label: there is no 'q'; the file has \['x', 'y'\]"),
        ("x,y\n1,2\n", {"id": "q"}, "id: there is no 'q'"),
        ("x,y\n1,2\n", {"truth": "q"}, "truth: there is no 'q'"),
        ("x,y\n1,2\n", {"label": "y", "truth": "y"}, "expected different names"),
        ("id,y\n1,2\n", {}, r"features: expected a column besides \['id', 'y'\]"),
        ("id,x,y\np,1,2\nq,1,\nr,1,\n", {}, "labels: 2 of 3 are missing, ids q, r"),
        ("id,x,y\n1,1,2\n,1,2\n", {}, "ids: 1 of 2 are missing, ids 1"),
        ("id,x,y\n1,1,2\n1,1,2\n", {}, "ids: expected unique ids, but 1 occurs 2 times"),
        ("x,y\n1,0.5\n", {}, "labels: expected whole numbers or strings, got 0.5 at id 0"),
        ("x,y,t\n1,a,\n", {"truth": "t"}, "truth: 1 of 1 are missing"),
        ("x,y,t\n1,a,0\n", {"truth": "t"}, r"truth: expected true labels or booleans, but none of its values \[0\] is a label \['a'\]"),
        ("x,y\n1,2\n1,2,3\n", {}, "expected comma-separated rows of one length"),
        ("x,y\n1,2,3\n1,2,3\n", {}, "its rows have more cells than its header has names"),
    ],
)
def test_a_broken_table_is_refused(tmp_path, text, names, message):
    with pytest.raises(ValueError, match=message):
        read(csv(tmp_path, text), **names)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.arange(3)}, "features: expected one of x, images, data"),
        ({"x": np.ones((3, 2)), "X": np.ones((3, 2)), "y": np.arange(3)}, r"features: .* found \['x', 'X'\]"),
        ({"x": np.ones((3, 2)), "y": np.arange(2)}, r"y: expected one value per sample, shape \(3,\), got \(2,\)"),
        ({"x": np.array([None, 1, 2]), "y": np.arange(3)}, "cannot read the array 'x' .* Python objects are pickled"),
        ({"x": np.ones((3, 1, 2, 2, 2)), "y": np.arange(3)}, "x: expected .* got shape"),
        ({"x": np.ones((3, 5, 5, 2)), "y": np.arange(3)}, r"x: expected images .* with 1, 3 or 4 channels, got shape \(3, 5, 5, 2\)"),
        ({"x": np.full((3, 5, 5), 1.5), "y": np.arange(3)}, "x: expected integers from 0 to 255 or floats from 0 to 1, got float64 from 1.5 to 1.5"),
    ],
)
def test_a_broken_archive_is_refused(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        read(npz(tmp_path, **arrays))


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a NumPy archive as numpy\.savez writes it, got another file"):
        read(csv(tmp_path, name="data.npz"))
    path = npz(tmp_path, x=np.ones((9, 9)), y=np.arange(9))
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="the archive is damaged"):
        read(path)


def test_broken_idx_files_are_refused(tmp_path):
    path = images_file(tmp_path)
    whole = path.read_bytes()
    for content, message in [
        (b"\0\0\x0d\x03" + whole[4:], r"expected an IDX file of bytes with 3 axes \(magic 00000803\), got '00000d03'"),
        (whole[:9], "it ends within its header"),
        (whole[:-1], r"its header announces shape \(6, 4, 5\), 120 bytes, but it holds 119"),
        (whole + b"x", "120 bytes, but it holds more"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read(path)
    with pytest.raises(ValueError, match=r"expected one label per image \(6\), got 5"):
        read(images_file(tmp_path, labels=5))
    with pytest.raises(ValueError, match="IDX files have no names to choose from"):
        read(path, label="y")
    dataset = read(images_file(tmp_path))
    with pytest.raises(ValueError, match="an IDX file holds integers from 0 to 255, got"):
        dataset.write(tmp_path / "clean", np.ones(6, bool), np.full(6, 256))
    images_file(tmp_path, name="t10k")
    with pytest.raises(ValueError, match=r"expected one IDX images file, found .*t10k-images.*train-images.*; pass the one to read"):
        read(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="expected its labels beside it in train-labels-idx1-ubyte"):
        read(path)


def test_broken_image_folders_are_refused(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    root = image_folder(tmp_path)
    odd = root / "dog" / "odd.png"
    pillow.fromarray(PNG[0][:3]).save(odd)
    with pytest.raises(ValueError, match=r"dog/odd\.png: expected mode L and 5 x 4 pixels like the first image, got L and 5 x 3 pixels"):
        read(root)
    pillow.fromarray(PNG[0]).convert("P").save(odd)
    with pytest.raises(ValueError, match=r"dog/odd\.png: expected a grey .* got mode P"):
        read(root)
    odd.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"odd\.png: the image cannot be read"):
        read(root)
    odd.unlink()
    pillow.fromarray(PNG[0]).save(tmp_path / "secret.png")
    odd.symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="it links to a file outside of"):
        read(root)
    odd.unlink()
    with pytest.raises(ValueError, match="an image folder has no names to choose from"):
        read(root, truth="true")
    with pytest.raises(ValueError, match=r"labels: expected names of sub-folders, got '\.\./up'"):
        read(root).write(tmp_path / "clean", np.ones(6, bool), ["../up"] * 6)


def test_saved_splits_and_two_image_columns_are_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    pillow = pytest.importorskip("PIL.Image")
    one = datasets.Dataset.from_dict({"x": [1, 2], "y": [0, 1]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "both")
    with pytest.raises(ValueError, match=r"expected one data set, found the splits \['train', 'test'\]"):
        read(tmp_path / "both")
    assert len(read(tmp_path / "both" / "train")) == 2
    image = [pillow.fromarray(PNG[0])]
    empty = datasets.Features({"image": datasets.Image(), "y": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": [], "y": []}, features=empty).save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty: it holds no sample"):
        read(tmp_path / "empty")
    datasets.Dataset.from_dict({"a": image, "b": image, "y": [0]}).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"expected one column of images, got \['a', 'b'\]"):
        read(tmp_path / "two")


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")

    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ImportError, match=r"reading a Hugging Face data set needs datasets, .* pip install 'robust-if\[hf\]'"):
        read(tmp_path)


def test_unknown_paths_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        read(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"expected one of: a table \.csv"):
        read(csv(tmp_path, name="notes.txt"))
    with pytest.raises(ValueError, match=r"expected one of: a table \.csv"):
        read(tmp_path)


def test_writing_refuses_wrong_shapes_and_never_overwrites(tmp_path):
    path = csv(tmp_path)
    dataset = read(path)
    keep = np.ones(4, bool)
    with pytest.raises(ValueError, match=r"keep: expected 4 booleans, got int64 of shape \(4,\)"):
        dataset.write(tmp_path / "clean", np.arange(4), dataset.labels)
    with pytest.raises(ValueError, match="keep: expected at least one sample to keep"):
        dataset.write(tmp_path / "clean", ~keep, dataset.labels)
    with pytest.raises(ValueError, match=r"labels: expected shape \(4,\), got \(3,\)"):
        dataset.write(tmp_path / "clean", keep, dataset.labels[:3])
    with pytest.raises(ValueError, match=r"labels: expected int64 as in the file, got str.*; decode encoded labels first"):
        dataset.with_labels(list("abcd"))
    with pytest.raises(ValueError, match="labels: 4 of 4 are missing, ids p1"):
        dataset.with_labels([None] * 4)
    with pytest.raises(FileExistsError, match="it exists already and is never overwritten"):
        dataset.write(tmp_path, keep, dataset.labels)
    assert path.read_text() == CSV and not (tmp_path / "clean").exists()


def test_a_truth_of_labels_follows_corrections_and_a_mask_does_not(tmp_path):
    dataset = read(csv(tmp_path), truth="true")
    assert dataset.with_labels([2, 2, 2, 2]).mislabelled.tolist() == [True, False, False, False]
    masked = read(csv(tmp_path, "x,y,bad\n1,a,True\n2,b,False\n", "mask.csv"), truth="bad")
    assert masked.with_labels(["b", "b"]).mislabelled.tolist() == [True, False] and list(masked.features) == ["x"]
    assert read(csv(tmp_path)).mislabelled is None


# Encoding


def people(folder: Path, n: int = 60, **extra: object) -> Path:
    """A table of all sorts of columns, with missing values."""
    draw = np.random.default_rng(1)
    frame = pd.DataFrame(
        {
            "number": np.where(np.arange(n) % 7 == 0, np.nan, draw.normal(10, 3, n)),
            "city": np.where(np.arange(n) % 5 == 0, None, draw.choice(["Rome", "Oslo"], n)),
            "code": [f"k{i}" for i in range(n)],
            "count": np.arange(5, n + 5),
            "flag": draw.random(n) > 0.5,
            "same": 1,
            "note": [f"the note number {i}" for i in range(n)],
            "label": np.where(np.arange(n) % 2, "yes", "no"),
        }
    )
    frame.assign(**extra).to_csv(folder / "people.csv", index=False)
    return folder / "people.csv"


def test_a_table_becomes_finite_standard_columns(tmp_path):
    dataset = read(people(tmp_path))
    encoder = Encoder.fit(dataset, max_words=10)
    samples = encoder.samples(dataset)
    x, y = samples.batch(slice(None))
    # number and its indicator, three cities (one is missing), two flags, ten words
    assert encoder.shape == (17,) and x.shape == (60, 17) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert set(encoder.dropped) == {"code", "count", "same"}
    torch.testing.assert_close(x[:, :2].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x[:, :2].std(0, correction=0), torch.ones(2))
    assert (x[:, 2:5].sum(1) == 1).all() and samples.ids.tolist() == dataset.ids.tolist()
    assert encoder.classes.tolist() == ["no", "yes"] and encoder.decode(y).tolist() == dataset.labels.tolist()


def test_encoding_a_part_equals_a_part_of_the_encoding(tmp_path):
    dataset = read(people(tmp_path))
    encoder = Encoder.fit(dataset.take(np.arange(40)))
    whole = encoder.samples(dataset).tensors[0]
    torch.testing.assert_close(encoder.samples(dataset.take([3, 50])).tensors[0], whole[[3, 50]], rtol=0, atol=0)


def test_unseen_categories_and_missing_values_are_encoded(tmp_path):
    train = read(csv(tmp_path, "c,x,y\n1,1,a\n2,2,b\n1,3,a\n2,4,b\nu,5,a\n"))
    other = read(csv(tmp_path, "c,x,y,more\n1,,a,0\n,5,b,0\n9,1,a,0\n", "other.csv"))
    encoder = Encoder.fit(train)
    x = encoder.samples(other).tensors[0]
    assert x.shape == (3, 4) and torch.isfinite(x).all()
    torch.testing.assert_close(x[:, 1:], torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]))
    assert x[0, 0] == 0  # the median of training is its mean here


def test_text_alone_becomes_word_weights(tmp_path):
    dataset = read(csv(tmp_path, "words,y\ngood film,a\nbad film,b\ngood fun,a\n"))
    encoder = Encoder.fit(dataset)
    x = encoder.samples(dataset).tensors[0]
    assert dataset.kind == "text" and encoder.shape == (4,)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(3))


def test_dates_are_numbers_and_must_be_so_later(tmp_path):
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"when": pd.to_datetime(["2020-01-01", "2020-01-02", None]), "y": [0, 1, 1]})
    frame.to_parquet(tmp_path / "t.parquet")
    dataset = read(tmp_path / "t.parquet")
    encoder = Encoder.fit(dataset)
    assert encoder.shape == (2,)
    with pytest.raises(ValueError, match="column 'when': expected numbers as in training, but"):
        encoder.samples(read(csv(tmp_path, "when,y\nsoon,1\n")))


def test_images_are_normalised_by_the_training_set(tmp_path):
    dataset = read(image_folder(tmp_path, colour=True))
    encoder = Encoder.fit(dataset)
    x = encoder.samples(dataset).tensors[0]
    assert encoder.shape == (3, 4, 5)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"images: expected \(channels, height, width\) = \(3, 4, 5\) as in training, got \(1, 4, 5\)"):
        encoder.samples(read(images_file(tmp_path)))
    with pytest.raises(ValueError, match="features: expected images as in training, got a table"):
        encoder.samples(read(csv(tmp_path)))
    with pytest.raises(ValueError, match="features: expected a table as in training, got images"):
        Encoder.fit(read(csv(tmp_path))).samples(dataset)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,a\n2,a\n", r"labels: expected at least two classes in the training set, got \['a'\]"),
        ("x,y\n" + "".join(f"1,{i}\n" for i in range(30)), "labels: expected classes, got 30 different values in 30 samples"),
        ("x,y\n1,a\ninf,b\n", "column 'x': 1 of its values are infinite, first in row 1"),
        ("x,z,y\n,1,a\n,2,b\n", "column 'x': all its values are missing in the training set"),
        ("x,y\n1,a\n1,b\n", r"features: no column can be used: \{'x': 'constant'\}"),
    ],
)
def test_an_encoder_refuses_what_it_cannot_learn_from(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        Encoder.fit(read(csv(tmp_path, text)))


def test_nested_columns_are_refused(tmp_path):
    pytest.importorskip("pyarrow")
    pd.DataFrame({"x": [[1, 2], [3, 4]], "y": [0, 1]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="column 'x': expected numbers, categories or text, got ndarray values"):
        Encoder.fit(read(tmp_path / "t.parquet"))


def test_an_encoder_refuses_other_labels_and_columns(tmp_path):
    encoder = Encoder.fit(read(csv(tmp_path, "x,y\n1,a\n2,b\n")))
    with pytest.raises(ValueError, match=r"labels out of range: \['c'\]; the training set has the classes \['a', 'b'\]"):
        encoder.samples(read(csv(tmp_path, "x,y\n1,c\n")))
    with pytest.raises(ValueError, match=r"features: the columns \['x'\] of the training set are missing; there are \['z'\]"):
        encoder.samples(read(csv(tmp_path, "z,y\n1,a\n")))
    with pytest.raises(ValueError, match="labels: expected 0 to 1, got 0 to 2"):
        encoder.decode([0, 2])


def test_a_split_must_be_apart_and_cover_the_classes(tmp_path):
    dataset = read(people(tmp_path))
    check_split(dataset.take(np.arange(40)), dataset.take(np.arange(40, 60)))
    with pytest.raises(ValueError, match="validation: expected at least one sample, got none"):
        check_split(dataset, dataset.take([]))
    with pytest.raises(ValueError, match=r"validation: 2 samples are also in the training set, ids \[38, 39\]"):
        check_split(dataset.take(np.arange(40)), dataset.take(np.arange(38, 60)))
    with pytest.raises(ValueError, match=r"validation: the training classes \['yes'\] do not occur in it"):
        check_split(dataset.take(np.arange(40)), dataset.take([40]))
    with pytest.raises(ValueError, match=r"validation: its classes \['yes'\] do not occur in the training set"):
        check_split(dataset.take([0]), dataset.take([40, 41]))


def test_numbers_of_an_archive_that_are_not_finite_are_named(tmp_path: Path) -> None:
    x = np.zeros((5, 3))
    x[3, 1] = np.nan
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(5) % 2)
    with pytest.raises(ValueError, match="1 samples hold NaN or infinity, first in row 3"):
        read(tmp_path / "a.npz")
