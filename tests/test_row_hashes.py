"""Hashes of the content of rows."""

import numpy as np
import torch

from know_hf.data import content_hash


def test_content_is_independent_of_number_types_and_column_order():
    assert content_hash(5) == content_hash(np.int32(5)) == content_hash(torch.tensor(5))
    assert content_hash({"a": 1, "b": [1, 2]}) == content_hash({"b": (1, 2), "a": 1})
    assert content_hash(np.arange(3, dtype="<f4")) == content_hash(np.arange(3, dtype=">f4"))
    assert content_hash(torch.ones(2, dtype=torch.bfloat16)) == content_hash(torch.ones(2))
    assert content_hash({"text": "ä", "ids": [1, 2], "none": None}).hex() == "15c04d5cc77a8ab963e943e8460d7f38"


def test_media_files_count_by_their_bytes_or_file_name():
    def media(data, path):
        return content_hash({"bytes": data, "path": path})

    assert media(b"1", "/a/x.png") == media(b"1", None) != media(b"2", "/a/x.png")
    assert media(None, "/a/x.png") == media(None, "C:\\b\\x.png") != media(None, "/a/y.png")


def test_different_content_has_different_hashes():
    values = [
        None, 0, 1, 1.5, "", "1", b"1", [], [1], [1.0], [[1]], ["1"], ["ab", "c"], ["a", "bc"], {}, {"a": 1}, {"b": 1},
        {"a": None}, np.ones(2), np.ones((2, 1)), np.ones(2, np.float32), [1, None], [None, 1],
    ]  # fmt: skip
    assert len({content_hash(value) for value in values}) == len(values)
