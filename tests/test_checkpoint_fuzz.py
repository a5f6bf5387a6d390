"""Damaged and hostile safetensors files: the reader accepts none that the library rejects, and reads equal bytes."""

import copy
import json
import math
import os
import tempfile
from collections import Counter
from itertools import count

import pytest
import torch
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save

from know_hf.checkpoint import CheckpointError, CheckpointReader

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import configuration, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

configuration.set_hypothesis_home_dir(os.path.join(tempfile.gettempdir(), "hypothesis"))  # not into the repository

# Errors for files that the library accepts: repeated names, of which it takes the last; fields that it ignores;
# spellings that no writer uses.
STRICTER = ("appears twice", "needs exactly dtype", "not a JSON object", "has dtype {", "acters, over")
FULL = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def file_bytes(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.fixture(scope="module")
def compare(tmp_path_factory):
    """Read bytes with both readers; the outcome is `"both"`, `"stricter"` or `"neither"`."""
    folder = tmp_path_factory.mktemp("files")
    numbers = count()

    def compare(data):
        path = folder / f"{next(numbers)}.safetensors"  # never write over a memory-mapped file
        path.write_bytes(data)
        try:
            reader = CheckpointReader([path])
        except CheckpointError as error:
            assert str(path) in str(error)
            assert len(str(error)) < 800 + len(str(path))
            try:
                deserialize(data)
            except SafetensorError:
                return "neither"
            assert any(reason in str(error) for reason in STRICTER), error
            return "stricter"
        with safe_open(path, framework="pt") as theirs:
            assert sorted(theirs.keys()) == reader.names
        for name, tensor in deserialize(data):
            assert list(reader.shape(name)) == tensor["shape"]
            try:
                read = reader.tensor(name)
            except CheckpointError as error:
                assert f"{name!r} has dtype" in str(error) and "torch does not support" in str(error)
                continue
            assert read.contiguous().flatten().view(torch.uint8).numpy().tobytes() == bytes(tensor["data"])
        path.unlink()
        return "both"

    return compare


def check(max_examples):
    return settings(max_examples=max_examples, derandomize=True, deadline=None, database=None)


@pytest.mark.parametrize(
    "data",
    [
        file_bytes({"a": entry()}, b"1234"),
        file_bytes({}),
        file_bytes({"__metadata__": None, "a": entry()}, b"1234"),
        file_bytes(json.dumps({"a": entry()}).encode() + b" \n", b"1234"),
        file_bytes({"a\x00": entry()}, b"1234"),
        file_bytes({"": entry()}, b"1234"),
        file_bytes(json.dumps({"\U0001f600": entry()}).encode(), b"1234"),
        file_bytes({"a": entry(shape=())}, b"1234"),
        file_bytes({"a": entry(shape=(0,), offsets=(0, 0)), "b": entry()}, b"1234"),
        file_bytes({"a": entry(shape=(0,), offsets=(4, 4)), "b": entry()}, b"1234"),
        file_bytes({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}),
        file_bytes({"a": entry("F4", (8,))}, b"1234"),
        file_bytes({"a": entry("F6_E2M3", (8,), (0, 6))}, b"123456"),
    ],
)  # fmt: skip
def test_both_readers_accept(compare, data):
    assert compare(data) == "both"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        (0).to_bytes(8, "little"),
        (2**63).to_bytes(8, "little") + b"{}",
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        (3).to_bytes(8, "little") + b"{}",
        file_bytes(b"[]"),
        file_bytes(b'"a"'),
        file_bytes(b"\xef\xbb\xbf{}"),
        file_bytes(b'{"a":NaN}'),
        file_bytes(b'{"\xe9":1}'),
        file_bytes(b'{"\xed\xa0\x80":1}'),
        file_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        file_bytes(b'{"a":' * 100_000),
        file_bytes(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + b"9" * 5000 + b"]}}", b"1234"),
        file_bytes(b'{"a\x01":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
        file_bytes({"a\ud800": entry()}, b"1234"),
        file_bytes({"__metadata__": {"a": "\ud800"}, "a": entry()}, b"1234"),
        file_bytes({"__metadata__": {"\ud800": "a"}, "a": entry()}, b"1234"),
        file_bytes({"__metadata__": [], "a": entry()}, b"1234"),
        file_bytes({"__metadata__": {"a": 1}, "a": entry()}, b"1234"),
        file_bytes({"__metadata__": entry()}, b"1234"),
        file_bytes(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', b"1234"),
        file_bytes({"a": entry(shape=(1.0,))}, b"1234"),
        file_bytes({"a": entry(shape=(True,))}, b"1234"),
        file_bytes({"a": entry(shape=(-1,))}, b"1234"),
        file_bytes({"a": entry(shape=(2,))}, b"1234"),
        file_bytes({"a": entry("F16")}, b"1234"),
        file_bytes({"a": entry("Q4")}, b"1234"),
        file_bytes({"a": entry("f32")}, b"1234"),
        file_bytes({"a": entry("F4", (4,))}, b"1234"),
        file_bytes({"a": entry("F4", (7,))}, b"1234"),
        file_bytes({"a": entry(shape=(2**62, 4), offsets=(0, 0))}),
        file_bytes({"a": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}),
        file_bytes({"a": entry(shape=[2] * 100_000, offsets=(0, 0))}),
        file_bytes({"a": entry(offsets=(4, 0))}, b"1234"),
        file_bytes({"a": entry(offsets=(0, 4, 4))}, b"1234"),
        file_bytes({"a": entry(), "b": entry()}, b"1234"),
        file_bytes({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456"),
        file_bytes({"a": entry(), "b": entry(offsets=(8, 12))}, b"123456789012"),
        file_bytes({"a": entry(shape=(0,), offsets=(2, 2)), "b": entry()}, b"1234"),
        file_bytes({"a": entry(offsets=(1, 5))}, b"12345"),
        file_bytes({"a": entry()}, b"12345"),
        file_bytes({"a": entry()}, b"123"),
        file_bytes({"a": {"dtype": "F32", "shape": [1]}}, b"1234"),
    ],
)
def test_both_readers_reject(compare, data):
    assert compare(data) == "neither"


@pytest.mark.parametrize(
    "data",
    [
        file_bytes(b'{"a":%b,"a":%b}' % ((json.dumps(FULL).encode(),) * 2), b"1234"),
        file_bytes({"a": {**FULL, "more": 1}}, b"1234"),
        file_bytes(b" " + json.dumps({"a": FULL}).encode(), b"1234"),
        file_bytes({"a": ["F32", [1], [0, 4]]}, b"1234"),
        file_bytes({"a" * 1001: entry()}, b"1234"),
    ],
)
def test_only_the_library_accepts(compare, data):
    assert compare(data) == "stricter"


def test_a_long_shape_is_rejected_in_linear_time(tmp_path):
    """The product of a million sizes has 20 million bits and takes hours to compute."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes({"a": entry(shape=[2**20] * 1_000_000, offsets=(0, 0))}))
    with pytest.raises(CheckpointError, match=r"'a'.* 0 bytes"):
        CheckpointReader([path])


@pytest.fixture(scope="module")
def valid():
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "weight": torch.randn(3, 4, generator=generator),
        "half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "eighth": torch.randn(2, 2, generator=generator).to(torch.float8_e4m3fn),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
        "complex": torch.tensor([1 + 2j]),
    }
    return save(tensors, metadata={"format": "pt"})


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_random_bytes(compare):
    @check(100)
    @given(st.binary(max_size=60), st.booleans())
    def run(data, as_header):
        assert compare(file_bytes(data) if as_header else data) == "neither"

    run()


def test_a_valid_file_with_random_edits(compare, valid):
    outcomes = Counter()
    length = int.from_bytes(valid[:8], "little")

    @check(300)
    @given(
        st.integers(0, length + 16), st.integers(0, 4), st.binary(max_size=4) | st.sampled_from(DIGITS), st.booleans()
    )
    def run(place, cut, inserted, fit):
        data = valid[:place] + inserted + valid[place + cut :]
        if fit and 8 <= place < length + 4:  # update the length of the header
            data = (length + len(inserted) - cut).to_bytes(8, "little") + data[8:]
        outcomes[compare(data)] += 1

    run()
    assert outcomes["neither"] > 100 and outcomes["both"] > 10, outcomes


DIGITS = [b"0", b"1", b"-", b"-0", b"e0", b".0", b'"', b"\\", b"\\ud800", b"[", b"{", b" ", b",", b"]", b"}", b"\xff"]

sizes = st.sampled_from([0, 1, 2, 3, 4, 8, 12, 48, 2**31, 2**32, 2**62, 2**63, 2**64, -1, 1.0, True, None, "1"])
odd = (
    sizes
    | st.sampled_from(["F32", "F64", "BF16", "U8", "I64", "F4", "F6_E3M2", "f32", "Q4", "", "\ud800", [], {}, entry()])
    | st.lists(sizes, max_size=3)
    | st.text(max_size=4)
)


def test_a_valid_header_with_random_changes(compare, valid):
    original, body = header_of(valid)
    outcomes = Counter()

    @check(400)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(sorted(original)),
                st.sampled_from(["dtype", "shape", "data_offsets", "rename", "delete", "whole", "element"]),
                odd,
                st.integers(0, 1),
            ),
            min_size=1,
            max_size=3,
        ),
        st.integers(-4, 4),
    )
    def run(changes, more):
        header = copy.deepcopy(original)
        for name, what, value, position in changes:
            target = header.get(name)
            if what == "delete":
                header.pop(name, None)
            elif what == "rename" and name in header:
                header[str(value)] = header.pop(name)
            elif what == "whole":
                header[name] = value
            elif what == "element" and isinstance(target, dict) and isinstance(target.get("shape"), list):
                place = target["shape" if position else "data_offsets"]
                if isinstance(place, list) and place:
                    place[position % len(place)] = value
            elif isinstance(target, dict):
                target[what] = value
        outcomes[compare(file_bytes(header, body + b"\x00" * more if more > 0 else body[: len(body) + more]))] += 1

    run()
    assert outcomes["neither"] > 100, outcomes


def test_files_of_random_tensors(compare):
    kinds = [torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.float8_e5m2, torch.uint16]

    @check(60)
    @given(
        st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
            st.tuples(st.sampled_from(kinds), st.lists(st.integers(0, 3), max_size=3)),
            max_size=5,
        )
    )
    def run(specs):
        tensors = {
            name: torch.arange(math.prod(shape)).to(kind).reshape(shape) for name, (kind, shape) in specs.items()
        }
        assert compare(save(tensors)) == ("both" if "__metadata__" not in tensors else "neither")

    run()
