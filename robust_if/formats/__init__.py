"""The file formats that :func:`robust_if.loading.read` knows: how each is recognised, and the function that reads it.

A reader returns :class:`Parts`, which carry their own writer; a new format is one file here and one line in the table below. The first
entry that recognises a path reads it.
"""

from robust_if.formats import hugging_face, idx, image_folder, npz, tables
from robust_if.formats.parts import Names, Parts, Reader, Recogniser

FORMATS: tuple[tuple[str, Recogniser, Reader], ...] = (
    ("a table .csv or .csv.gz", tables.is_csv, tables.read_csv),
    ("a table .parquet", tables.is_parquet, tables.read_parquet),
    ("arrays .npz", npz.is_npz, npz.read_npz),
    ("IDX files such as train-images-idx3-ubyte[.gz], or their folder", idx.is_idx, idx.read_idx),
    ("a Hugging Face data set saved on disk", hugging_face.is_saved, hugging_face.read_saved),
    ("a folder of images class/*.png or class/*.jpg", image_folder.is_folder, image_folder.read_folder),
)

__all__ = ["FORMATS", "Names", "Parts", "Reader", "Recogniser"]
