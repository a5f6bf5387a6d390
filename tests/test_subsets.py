"""Subsets of datasets and streams, and their fingerprints."""

import io
import pickle
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, Value
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import Trainer, TrainingArguments

from know_hf import ForgettingSchedule
from know_hf.data import divide, streams


def sized(**options):
    return ForgettingSchedule(**{"num_states": 3, **options})


def streamed(**options):
    return ForgettingSchedule(**{"num_states": 3, "steps_per_stage": 2, **options})


SIZED, STREAM = sized(), streamed()


def make_rows(num_examples=100):
    numbers = range(num_examples)
    return Dataset.from_dict(
        {"text": [f"row {i}" for i in numbers], "label": [i % 3 for i in numbers], "score": [i / 7 for i in numbers]}
    )


def make_stream(num_examples=400, num_shards=4):
    return make_rows(num_examples).to_iterable_dataset(num_shards=num_shards)


def fingerprints(parts):
    return [part.fingerprint for part in parts]


def texts(part):
    return [row["text"] for row in part]


class TorchStream(TorchIterableDataset):
    """Mappings of tensors; each worker takes every n-th row."""

    def __init__(self, num_examples=400):
        self.num_examples = num_examples
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for index in range(first, self.num_examples, step):
            yield {"x": torch.tensor([index / 3, 1.0]), "id": torch.tensor(index)}


class TorchRows(torch.utils.data.Dataset):
    """Tensors with a transform that runs at every reading."""

    def __init__(self, values=range(100), transform=lambda x: x):
        self.values = list(values)
        self.transform = transform

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        x = torch.tensor([self.values[index] / 3])
        return {"x": self.transform(x), "label": self.values[index] % 2}


# Datasets with a length


def test_members_and_fingerprints_are_those_of_version_0_1():
    for dataset, schedule in ((make_rows(), SIZED), (TorchRows(), SIZED), (make_stream(), STREAM)):
        assert divide(dataset, schedule)[0].dataset is dataset
    # fixed values: recorded trajectories could not resume with others
    streamed_parts = divide(make_stream(100), STREAM)
    assert fingerprints(streamed_parts) == ["33ddffed2b391607", "66bc2501bf8e8e36", "ce4619bb743f745c"]
    assert texts(streamed_parts[2].dataset)[:6] == ["row 0", "row 3", "row 4", "row 6", "row 9", "row 11"]
    parts = divide(make_rows(), SIZED, batch_size=8)
    assert fingerprints(parts) == ["1f7c120289e6cc26", "603cbdc0a63ac79c", "fe532c45c0651f12"]
    stratified = divide(make_rows(), sized(stratify_by="label"))
    assert fingerprints(stratified) == ["1f7c120289e6cc26", "8df20d4d8a33dd84", "ec0cea13d86d2db4"]
    assert [part.num_examples for part in parts] == [100, 50, 25]
    assert [part.fraction for part in parts] == [1, 0.5, 0.25]
    for part, indices in zip(parts, SIZED.indices(100), strict=True):
        assert texts(part.dataset) == [f"row {index}" for index in indices]


def test_the_fingerprint_depends_on_data_but_not_on_formats_and_transforms():
    rows, expected = make_rows(), fingerprints(divide(make_rows(), SIZED))
    noisy = rows.with_transform(lambda batch: {"x": [random.random() for _ in batch["text"]]})
    assert fingerprints(divide(rows.with_format("torch"), SIZED)) == expected
    assert fingerprints(divide(noisy, SIZED)) == expected
    swapped = rows.map(lambda row: {"text": row["text"].upper()})
    assert not set(fingerprints(divide(swapped, SIZED))) & set(expected)
    assert not set(fingerprints(divide(make_rows(99), SIZED))) & set(expected)


def test_groups_stay_together():
    rows = make_rows(400).add_column("doc", [i // 4 for i in range(400)])
    parts = divide(rows, sized(group_by="doc"))
    assert [part.num_examples for part in parts] == [400, 200, 100]
    streams = divide(rows.to_iterable_dataset(), streamed(group_by="doc"))
    for part in streams:
        groups = len({row["doc"] for row in part.dataset})
        assert abs(groups - 100 * part.fraction) <= 4 * np.sqrt(100 * part.fraction * (1 - part.fraction))
    for larger, smaller in (*pairwise(parts), *pairwise(streams)):
        assert set(texts(smaller.dataset)) < set(texts(larger.dataset))
        assert set(Counter(row["doc"] for row in smaller.dataset).values()) == {4}


def test_a_torch_dataset_is_divided_grouped_and_stratified():
    parts = divide(TorchRows(), SIZED)
    assert fingerprints(divide(TorchRows(), SIZED)) == fingerprints(parts)
    assert not set(fingerprints(divide(TorchRows(range(1, 101)), SIZED))) & set(fingerprints(parts))
    for part, indices in zip(parts[1:], SIZED.indices(100)[1:], strict=True):
        assert [row["x"].item() for row in part.dataset] == pytest.approx([index / 3 for index in indices])
    stratified = divide(TorchRows(), sized(stratify_by="label"))[2].dataset
    assert sum(row["label"] for row in stratified) in (12, 13)
    grouped = divide(TorchRows(), sized(num_states=2, group_by="label"))[1].dataset
    assert len({row["label"] for row in grouped}) == 1


def test_seeded_augmentation_does_not_change_the_fingerprint():
    def augmented(values=range(100)):
        return TorchRows(values, lambda x: x + torch.rand(1) + random.random() + np.random.rand())

    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    expected = fingerprints(divide(augmented(), SIZED))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]
    torch.rand(1), random.random(), np.random.rand()
    assert fingerprints(divide(augmented(), SIZED)) == expected
    assert fingerprints(divide(augmented(range(1, 101)), SIZED)) != expected

    generator = np.random.default_rng()  # not reset by global seeds: only the length counts
    own, other = (TorchRows(values, lambda x: x + generator.random()) for values in (range(100), range(1, 101)))
    assert fingerprints(divide(own, SIZED)) == fingerprints(divide(other, SIZED))
    assert fingerprints(divide(own, SIZED)) != fingerprints(divide(TorchRows(range(99)), SIZED))
    unknown, again = ([object()] * 100 for _ in range(2))
    assert fingerprints(divide(unknown, SIZED)) == fingerprints(divide(again, SIZED))


def test_classes_may_be_tensors_of_one_number():
    halves = []
    for make in (int, lambda index: torch.tensor([index])):
        rows = [{"label": make(index % 3), "row": index} for index in range(12)]
        halves.append([row["row"] for row in divide(rows, sized(stratify_by="label"))[1].dataset])
    assert halves[0] == halves[1] and len(halves[0]) == 6


# Streams


def test_streamed_subsets_are_nested_and_of_the_expected_share():
    parts = divide(make_stream(4000), ForgettingSchedule(steps_per_stage=2), batch_size=8)
    assert [part.num_examples for part in parts] == [None] * 5
    rows = [texts(part.dataset) for part in parts]
    for larger, smaller in pairwise(rows):
        assert set(smaller) < set(larger)
    for members, part in zip(rows, parts, strict=True):
        expected = 4000 * part.fraction
        assert abs(len(members) - expected) <= 4 * np.sqrt(expected * (1 - part.fraction))
    other = texts(divide(make_stream(4000), streamed(seed=1))[1].dataset)
    assert abs(len(set(rows[1]) & set(other)) - 1000) < 120  # seeds choose independent halves


@pytest.mark.parametrize("column", ["key_column", "group_by"])
@pytest.mark.parametrize("empty", [None, float("nan")])
def test_streamed_rows_without_a_key_are_divided_by_content(column, empty):
    rows = Dataset.from_dict({"text": [str(i) for i in range(1000)], "key": [empty] * 1000}).to_iterable_dataset()
    assert len(list(divide(rows, streamed(**{column: "key"}))[1].dataset)) == pytest.approx(500, abs=80)


@pytest.mark.parametrize("key_column", [None, "text"])
def test_membership_depends_on_neither_order_nor_sharding_nor_workers(key_column):
    schedule = streamed(key_column=key_column)
    expected = sorted(texts(divide(make_stream(), schedule)[2].dataset))
    shuffled = divide(make_stream().shuffle(seed=3, buffer_size=50), schedule)[2].dataset
    assert texts(shuffled) != texts(divide(make_stream(), schedule)[2].dataset)
    assert sorted(texts(shuffled)) == expected
    shuffled.set_epoch(1)
    assert sorted(texts(shuffled)) == expected
    assert sorted(texts(divide(make_stream(num_shards=1), schedule)[2].dataset)) == expected
    ranks = [divide(split_dataset_by_node(make_stream(), rank, 2), schedule) for rank in (0, 1)]
    assert sorted(text for rank in ranks for text in texts(rank[2].dataset)) == expected
    assert fingerprints(ranks[0]) == fingerprints(ranks[1])
    loader = DataLoader(divide(make_stream(), schedule)[2].dataset, batch_size=None, num_workers=2)
    assert sorted(texts(loader)) == expected


def test_a_streamed_subset_resumes_from_its_state_dict():
    part = divide(make_stream(), STREAM)[1].dataset
    everything = texts(part)
    rows = iter(part)
    for _ in range(30):
        next(rows)
    state = part.state_dict()
    again = divide(make_stream(), STREAM)[1].dataset
    again.load_state_dict(state)
    assert texts(again) == everything[30:]


def test_format_features_and_rows_of_a_stream_are_preserved():
    stream = make_stream().with_format("torch")
    parts = divide(stream, STREAM)
    assert parts[1].dataset.features == stream.features
    assert parts[1].dataset.column_names == ["text", "label", "score"]
    rows = {row["text"]: row for row in stream}
    for row in parts[1].dataset:
        assert isinstance(row["score"], torch.Tensor)
        assert str(row) == str(rows[row["text"]])
    # 32-bit copies of the numbers do not change the members
    assert texts(parts[2].dataset) == texts(divide(make_stream(), STREAM)[2].dataset)
    assert fingerprints(parts) == fingerprints(divide(make_stream(), STREAM))


def make_pictures(format="PNG", **options):
    from PIL import Image as PilImage

    features = Features({"image": Image(), "label": Value("int64")})
    pictures = []
    for index in range(80):
        buffer = io.BytesIO()
        pixels = (np.random.RandomState(index).rand(8, 8) * 255).astype(np.uint8)
        PilImage.fromarray(pixels).save(buffer, format, **options)
        pictures.append({"bytes": buffer.getvalue(), "path": f"/home/someone/{index}.{format}"})
    return Dataset.from_dict({"image": pictures, "label": list(range(80))}, features=features)


@pytest.mark.parametrize("change", [lambda s: s, lambda s: s.shuffle(seed=0, buffer_size=10)])
def test_images_count_by_their_bytes_and_are_decoded(change):
    rows = make_pictures("JPEG")
    stream = change(rows.to_iterable_dataset(num_shards=2))
    parts = divide(stream, STREAM)
    assert parts[2].dataset.features == stream.features
    for row in parts[2].dataset:
        assert np.array_equal(np.asarray(row["image"]), np.asarray(rows[row["label"]]["image"]))
    moved = rows.cast_column("image", Image(decode=False)).map(
        lambda row: {"image": {**row["image"], "path": "/data/" + row["image"]["path"][-7:]}}, features=rows.features
    )
    again = divide(change(moved.to_iterable_dataset(num_shards=2)), STREAM)
    assert fingerprints(again) == fingerprints(parts)
    assert [row["label"] for row in again[2].dataset] == [row["label"] for row in parts[2].dataset]


def test_only_decoded_images_count_by_their_pixels():
    same_pixels = (make_pictures(compress_level=level).to_iterable_dataset() for level in (0, 9))
    first, second = (fingerprints(divide(pictures, STREAM)) for pictures in same_pixels)
    assert first != second
    stream = make_pictures().to_iterable_dataset(num_shards=2).filter(lambda row: row["image"] is not None)
    members = {row["label"] for row in divide(stream, STREAM)[1].dataset}
    assert 0 < len(members) < 80
    mapped = make_pictures().to_iterable_dataset(num_shards=2).map(lambda row: {"label": row["label"]})
    assert {row["label"] for row in divide(mapped, STREAM)[1].dataset} == members


def test_a_torch_stream_is_wrapped():
    stream = TorchStream()
    parts = divide(stream, STREAM, batch_size=4)
    part = parts[2].dataset
    expected = [row["id"].item() for row in part]
    assert 60 < len(expected) < 140
    assert {row["id"].item() for row in parts[1].dataset} > set(expected)
    part.set_epoch(3)
    assert stream.epoch == 3
    loader = DataLoader(part, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(row["id"].item() for row in loader) == expected
    assert [row["id"].item() for row in pickle.loads(pickle.dumps(part))] == expected
    numbers = IterableDataset.from_generator(lambda: ({"text": i} for i in range(400)))
    keyed, expected = divide(stream, streamed(key_column="id")), divide(numbers, streamed(key_column="text"))
    assert {row["id"].item() for row in keyed[2].dataset} == {row["text"] for row in expected[2].dataset}


def test_fingerprints_of_streams():
    expected = fingerprints(divide(make_stream(), STREAM))
    assert len(set(expected)) == 3
    assert fingerprints(divide(make_stream(), STREAM)) == expected
    stream = make_stream()
    stream.set_epoch(2)  # as after a training
    assert fingerprints(divide(stream, STREAM)) == expected
    swapped = make_stream().map(lambda row: {"text": row["text"].upper()})
    others = [(swapped, STREAM), (make_stream(), streamed(seed=1)), (make_stream(), streamed(key_column="text"))]
    for other, schedule in others:
        assert not set(fingerprints(divide(other, schedule))) & set(expected)


def test_a_stream_with_random_content_needs_a_key():
    noisy = make_stream().map(lambda row: {"score": row["score"] + random.random()})
    with pytest.raises(ValueError, match="first 64 rows of the IterableDataset differ"):
        divide(noisy, STREAM)
    keyed = streamed(key_column="text")
    parts = divide(noisy, keyed)
    assert texts(parts[2].dataset) == texts(divide(make_stream(), keyed)[2].dataset)
    assert fingerprints(parts) == fingerprints(divide(noisy, keyed))
    shifted = make_stream().skip(1).map(lambda row: {"score": row["score"] + random.random()})
    assert fingerprints(parts) != fingerprints(divide(shifted, keyed))


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 3)
        self.seen = []

    def forward(self, score, labels):
        self.seen += score.tolist()
        return {"loss": torch.nn.functional.cross_entropy(self.linear(score.float()[:, None]), labels)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_accepts_a_streamed_subset(tmp_path, workers):
    stream = make_stream(120).rename_column("label", "labels").remove_columns("text")
    part = divide(stream.shuffle(seed=0, buffer_size=20), STREAM, batch_size=4)[2].dataset
    options = {"max_steps": 12, "per_device_train_batch_size": 4, "dataloader_num_workers": workers, "use_cpu": True}
    quiet = {"dataloader_pin_memory": False, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
    args = TrainingArguments(str(tmp_path), **options, **quiet)
    trainer = Trainer(Line(), args, train_dataset=part)
    trainer.train()
    assert trainer.state.global_step == 12
    members = {row["score"] for row in part}
    assert len(trainer.model.seen) > len(members)  # more than one epoch
    assert {round(7 * score) for score in trainer.model.seen} == {round(7 * score) for score in members}


# Errors


class Nothing(TorchIterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("dataset", "schedule", "message"),
    [
        (None, SIZED, "train_dataset"),
        (DatasetDict({"train": make_rows()}), SIZED, r"DatasetDict of \['train'\]"),
        (iter(()), SIZED, "tuple_iterator.*not an IterableDataset"),
        (make_rows(10), SIZED, r"10 examples have sizes \[10, 5, 2\].* batch of 4"),
        (make_rows(), sized(stratify_by="y"), r"no column 'y' to stratify by.*\['text', 'label', "),
        (make_rows(), sized(group_by="doc"), r"no column 'doc' to group by.*\['text', 'label', "),
        (TorchRows(), sized(group_by="doc"), r"no column 'doc' to group by.*\['x', 'label'\]"),
        ([(1, 2)] * 99, sized(group_by="doc"), "rows of type tuple"),
        (TorchRows(), sized(group_by="x"), r"'x' holds a list, \[0\.0\]"),
        ([{"label": [i, 1]} for i in range(99)], sized(stratify_by="label"), r"'label' holds a list, \[0, 1\]"),
        (Dataset.from_dict({"y": ["a", "b", None] * 33}), sized(stratify_by="y"), "'y' has no class in row 2 "),
        (Dataset.from_dict({"doc": ["a", "b", None] * 33}), sized(group_by="doc"), "no group in row 2 .*None"),
        (Dataset.from_dict({"doc": [1.0, float("nan")] * 33}), sized(group_by="doc"), "no group in row 1 .*nan"),
        (make_rows(), sized(key_column="text"), "key_column='text' is for streams, but this Dataset"),
        (make_stream(), SIZED, "IterableDataset is a stream.* steps_per_stage"),
        (TorchStream(), SIZED, "TorchStream is a stream.* steps_per_stage"),
        (make_stream(), streamed(stratify_by="label"), "cannot be stratified by 'label'"),
        (make_stream(), streamed(key_column="id"), r"no column 'id' to choose by.*\['text', 'label', 'score'\]"),
        (Nothing(), STREAM, "Nothing is empty"),
        (make_rows(1).to_iterable_dataset().skip(1), STREAM, "IterableDataset is empty"),
        (make_stream(8, 1), STREAM, r"ends after 8 rows, have sizes \[8, 4, 4\].* not shrink"),
        (make_stream(6, 1), STREAM, r"ends after 6 rows, have sizes \[6, 3, 3\].* batch of 4"),
    ],
)  # fmt: skip
def test_datasets_that_cannot_be_divided(dataset, schedule, message):
    with pytest.raises(ValueError, match=message):
        divide(dataset, schedule, batch_size=4)


def test_an_endless_stream_with_one_key_is_an_error(monkeypatch):
    class Endless(TorchIterableDataset):
        def __iter__(self):
            while True:
                yield {"doc": "the same", "x": 1}

    monkeypatch.setattr(streams, "_PATIENCE", 100)
    for seed, sizes in ((0, "400, 0, 0"), (1, "400, 400, 400"), (7, "400, 400, 0")):
        schedule = streamed(group_by="doc", seed=seed)
        with pytest.raises(ValueError, match=rf"\[{sizes}\] of the first 400 rows of the Endless.* 'doc'"):
            divide(Endless(), schedule, batch_size=1)


def test_rows_without_canonical_content_name_the_column():
    class Objects(TorchIterableDataset):
        def __iter__(self):
            return iter([{"id": index, "audio": object()} for index in range(100)])

    with pytest.raises(ValueError, match=r"column 'audio'.* builtins\.object .*key_column"):
        divide(Objects(), STREAM)
    keyed = streamed(key_column="id")
    assert fingerprints(divide(Objects(), keyed)) == fingerprints(divide(Objects(), keyed))
