"""What a Python program holds, wherever a path goes: the same pixels and classes as of the same images on the disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from mim_refiner.data.decode import ImageSet
from mim_refiner.data.sources import open_source
from mim_refiner.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
CLASSES = ["owl", "cat", "owl", "cat", "cat", "owl"]


class Pairs(Dataset[Any]):
    """(picture, label), as torchvision's data sets are."""

    classes = ("cat", "owl")

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(PIXELS[index]), self.classes.index(CLASSES[index])


class Targets(Pairs):
    """Knows its labels without opening an image."""

    targets: ClassVar = [Pairs.classes.index(name) for name in CLASSES]
    opened: ClassVar[list[int]] = []

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.opened.append(index)
        return super().__getitem__(index)


class Column:
    names = ("cat", "owl")


class HuggingFace:
    """What is used of datasets.Dataset."""

    column_names = ("image", "label")
    features: ClassVar = {"image": object(), "label": Column()}

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, key: int | str) -> Any:
        numbers = [Column.names.index(name) for name in CLASSES]
        return numbers if key == "label" else {"image": Image.fromarray(PIXELS[int(key)]), "label": numbers[int(key)]}


def pictures() -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in PIXELS]


WAYS: dict[str, Callable[[], Any]] = {
    "array": lambda: PIXELS,
    "pictures": pictures,
    "list of arrays": lambda: list(PIXELS),
    "tensor": lambda: torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy()),
    "torch data set": Pairs,
    "targets": Targets,
    "tensors": lambda: TensorDataset(
        torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy()), torch.tensor([1, 0, 1, 0, 0, 1])
    ),
    "hugging face": HuggingFace,
    "with labels": lambda: (pictures(), CLASSES),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_pixels_and_labels(way: str) -> None:
    images = ImageSet(open_source(WAYS[way]()))
    assert images.unreadable == []
    assert all(np.array_equal(images.load(index), PIXELS[index]) for index in range(6))
    if way in ("array", "pictures", "list of arrays", "tensor"):
        assert images.labels is None
        assert "give (images, labels)" in images.source.no_labels
    else:
        assert images.class_names is not None
        names = [images.class_names[number] for number in images.labels]
        assert names == (["1" if name == "owl" else "0" for name in CLASSES] if way == "tensors" else CLASSES)


def test_a_data_set_that_knows_its_labels_is_not_opened_for_them() -> None:
    Targets.opened.clear()
    open_source(Targets())
    assert set(Targets.opened) == {0}


def test_items_may_come_from_another_source() -> None:
    class Wrapped(Pairs):
        inner = open_source(pictures())

        def __getitem__(self, index: int) -> Any:
            return Image.fromarray(self.inner.read(index)), 0

    found: list[Any] = []  # in a thread: two locks in each other would wait for ever
    thread = threading.Thread(target=lambda: found.append(open_source(Wrapped()).read(5)), daemon=True)
    thread.start()
    thread.join(20)
    assert np.array_equal(found, PIXELS[5:])


def test_the_fingerprint_tells_pixels_and_labels_apart() -> None:
    prints = {open_source(way()).fingerprint() for way in (pictures, lambda: list(PIXELS), lambda: PIXELS)}
    assert len(prints) == 1
    assert open_source((PIXELS, CLASSES)).fingerprint() not in prints
    assert open_source(PIXELS[::-1]).fingerprint() not in prints


def test_paths_in_a_list_and_odd_pictures(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, picture in zip(files, pictures(), strict=False):
        picture.save(file)
    source = open_source((files, ["a", "b", "a"]))
    assert source.class_names == ("a", "b")
    assert np.array_equal(ImageSet(source).load(2), PIXELS[2])
    assert len(open_source([os.fspath(file) for file in files])) == 3
    see_through = Image.fromarray(np.dstack([PIXELS[0], np.zeros((8, 8), np.uint8)]), "RGBA")
    grey = Image.fromarray(PIXELS[0, :, :, 0])
    loaded = ImageSet(open_source([see_through, grey]))
    assert (loaded.load(0) == 255).all()  # on white, as from a file
    assert np.array_equal(loaded.load(1), np.repeat(PIXELS[0, :, :, :1], 3, axis=2))


class Breaks(Pairs):
    """Raises for one item, as a data set of torchvision does at a damaged file."""

    def __init__(self, broken: int) -> None:
        self.broken = broken

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == self.broken:
            raise OSError("cannot identify image file")
        return super().__getitem__(index)


def test_an_item_that_cannot_be_read_is_an_unreadable_image():
    images = ImageSet(open_source(Breaks(5)))
    assert images.source.fingerprint()
    assert images.source.no_labels == "item 5 cannot be read (cannot identify image file), nor its label"
    assert [images.try_load(row) is None for row in range(6)] == [False] * 5 + [True]
    with pytest.raises(DataError, match=r"item 0: cannot be read \(cannot identify image file\)"):
        open_source(Breaks(0))


class Listed(Dataset[Any]):
    """Of the items given, with what a data set of torchvision knows beside them."""

    def __init__(self, *labels: Any, **known: Any) -> None:
        self.items = [(PIXELS[row], *([] if label is ... else [label])) for row, label in enumerate(labels)]
        self.__dict__ |= known

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Listed(0, 1, ...), "item 2 has no label, as item 0 has; give all or none"),
        ([{"image": PIXELS[0], "label": 0}, {"image": PIXELS[1]}], "item 1 has no label"),
        (Listed(0, 2, classes=["a", "b"]), "item 1 has the label 2, and the data set 2 class names; correct one"),
        (Listed(-1, -1, classes=["a", "b"]), "item 0 has the label -1"),
        (Listed(0, None, classes=["a", "b"]), "item 1 has the label None"),
        (Listed(0, 0.5, classes=["a", "b"]), "item 1 has the label 0.5"),
    ],
)
def test_labels_that_some_items_lack_are_none_and_the_images_are_read(given: Any, words: str) -> None:
    source = open_source(given)
    assert source.classes is None
    assert words in source.no_labels
    assert ImageSet(source).unreadable == []


def test_names_are_taken_where_labels_are_numbers() -> None:
    assert open_source(Listed(1, 0, classes=["b", "a"])).class_names == ("a", "b")
    assert open_source(Listed("x", "y", classes=["b", "a"])).class_names == ("x", "y")
    for odd in ({"classes": 2}, {"classes": "ab"}, {"targets": 3}):
        assert open_source(Listed(0, 1, **odd)).class_names == ("0", "1")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (3, "data of type int holds no images; give a path, an array"),
        (None, "data of type NoneType"),
        ([], "of type list is empty"),
        ({"images": PIXELS}, "data of type dict"),
        (PIXELS.astype(np.float32) / 255, "images are float32; give uint8 or uint16, before ToTensor"),
        ([torch.zeros(3, 8, 8)], "float32"),
        (torch.from_numpy(PIXELS), r"tensors are [C, H, W], not (8, 8, 3); permute them"),
        ([object()], "an item of type object is no image"),
        ([{"picture": 1}], "no column image or img among picture; rename one"),
    ],
)
def test_wrong_types_are_one_line(given: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_that_do_not_fit_are_a_reason() -> None:
    assert "6 images but 2 labels" in open_source((PIXELS, [0, 1])).no_labels
    items = list(enumerate(PIXELS))
    for label, reason in (
        ([1, 0], "labels of shape (6, 2)"),
        (np.eye(2)[0], "labels of shape (6, 2)"),
        (None, "NoneType"),
    ):
        assert reason in open_source([(pixels, label) for _, pixels in items]).no_labels
    assert "the labels are list" in open_source([(pixels, [1] * number) for number, pixels in items]).no_labels
    assert open_source([(pixels, np.array([number % 2])) for number, pixels in items]).classes.ids == (0, 1)


def test_labels_of_text_stay_as_they_are() -> None:
    """In a NumPy array of text each would be as long as the longest, and lose a NUL at its end."""
    assert open_source((PIXELS, ["a\0", "a"] * 3)).labels.tolist() == [1, 0] * 3
