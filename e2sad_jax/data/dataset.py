"""The data set that everything takes, its splits, and what its arrays must hold."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from e2sad_jax import _arguments, _io
from e2sad_jax.data import in_file
from e2sad_jax.data.known import KNOWN, Known
from e2sad_jax.errors import ConfigError, DataError

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
MAX_CLASSES = 2**31 - 1  # labels are int32
VALIDATION_EXAMPLES = 500  # size of the validation set where no training images are held out


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels in host memory, or in a file too large for it, with what a report says about them.

    The arrays are kept as read-only views, because `sha256` identifies their content.

    Attributes:
      name: of `KNOWN`; NAME/CONFIG@TRAIN,TEST of other sets of tensorflow-datasets; for a user's file its stem. Every report
        shows it.
      version: the tensorflow-datasets version, or "".
      x_train: training images `[N, H, W, C]`, uint8 in 0..255, or float32 in [0, 1] if the user's file holds floats. A part
        of those in a file is `in_file.Rows`.
      y_train: their labels `[N]`, int32 in [0, num_classes).
      x_test: test images `[M, H, W, C]`, of the dtype of `x_train`.
      y_test: their labels `[M]`, int32 in [0, num_classes).
      num_classes: number of classes, at least 2.
      source_sha256: SHA-256 of each original file by its name, of other sets of tensorflow-datasets of the file that describes
        the records, else empty.
    """

    name: str
    version: str
    x_train: np.ndarray | in_file.Rows
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    source_sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for member in ARRAYS:
            array = getattr(self, member)
            if not isinstance(array, in_file.Rows):
                array = np.asarray(array).view()
                array.flags.writeable = False
            object.__setattr__(self, member, array)

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of dtype, shape and bytes of the four arrays, and of `num_classes`; the name is not part of it."""
        return _io.digest({member: getattr(self, member) for member in ARRAYS}, f"num_classes={self.num_classes}\n")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (H, W, C) of one image."""
        height, width, channels = self.x_train.shape[1:]
        return height, width, channels


def sample(labels: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
    """Draws `n` images so that each class has its share of them: the places, in order.

    The draw depends on the labels, `n` and `seed` alone, so every model and every command has the same images. A class has
    its share to within one, the rest by largest remainder; but every class has an image if `n` is at least their number.

    Args:
      labels: `[N]`, integers.
      n: how many to draw, at least 0; all of them if there are not more.
      seed: of the draw within each class.

    Returns:
      int64 `[min(n, N)]`, increasing.

    Raises:
      ValueError: if `n` is no whole number, or below 0.
    """
    _arguments.count("sample: n", n, least=0)
    total = len(labels)
    if n >= total:
        return np.arange(total)
    _, kind, counts = np.unique(labels, return_inverse=True, return_counts=True)
    taken = n * counts // total
    if n >= len(counts):
        taken = np.maximum(taken, 1)
    while (missing := n - int(taken.sum())) != 0:
        owed = n * counts - taken * total  # in images, times `total`
        if missing > 0:
            taken[np.argmax(owed)] += 1
        else:  # classes that have the one image that each must have keep it
            taken[np.argmin(np.where(taken > 1, owed, np.iinfo(np.int64).max))] -= 1
    order = np.random.default_rng(seed).permutation(total)
    return np.sort(np.concatenate([order[kind[order] == k][:count] for k, count in enumerate(taken)]))


def sample_tests(dataset: Dataset, count: int) -> Dataset:
    """Returns the data set with a `sample` of `count` of its test images; with all of them for 0."""
    return subset(dataset, test=sample(dataset.y_test, count)) if count else dataset


def in_words(count: int, there: int, classes: int | None, num_classes: int, kind: str = "test images") -> str:
    """Says which images something was measured on: "all 355 test images", "500 of 10,000 test images, 10 of 10 classes".

    Args:
      count: how many images.
      there: how many there are of their kind.
      classes: how many classes have one among them; None of results from before there was a `sample`.
      num_classes: number of classes.
      kind: what the images are.
    """
    images = f"all {there:,} {kind}" if count == there else f"{count:,} of {there:,} {kind}"
    if classes is None:
        return images if count == there else f"the first {images}"
    return f"{images}, {classes} of {num_classes} classes" if count < there or classes < num_classes else images


def hold_out(dataset: Dataset, count: int) -> tuple[Dataset, Dataset]:
    """Splits the training images into those that train and those that choose the best checkpoint.

    The choice of images depends on their number and `count` alone. The test images are never looked at.

    Args:
      dataset: all the data.
      count: how many training images to hold out. 0 holds out none: `VALIDATION_EXAMPLES` of the training images choose
        the checkpoint. They show a collapse under attack but not overfitting, and the paper's training set stays whole.

    Returns:
      The data set without the held-out images, and the data set whose test images are the validation set.

    Raises:
      ConfigError: if no training images are left.
    """
    n = len(dataset.x_train)
    if count >= n:
        raise ConfigError(f"--validation_examples={count}: must be below the {n:,} training images of {dataset.name}")
    order = np.random.default_rng(0).permutation(n)
    chosen = order[: count or VALIDATION_EXAMPLES]
    validation = dataclasses.replace(dataset, x_test=dataset.x_train[chosen], y_test=dataset.y_train[chosen])
    return (subset(dataset, train=order[count:]) if count else dataset), validation


def subset(
    dataset: Dataset, train: slice | np.ndarray = slice(None), test: slice | np.ndarray = slice(None)
) -> Dataset:
    """Returns a part of a data set, under the same name.

    Args:
      dataset: all the data.
      train: which training images: a slice, indices, or a mask.
      test: which test images.
    """
    return dataclasses.replace(
        dataset,
        x_train=in_file.rows(dataset.x_train, train),
        y_train=dataset.y_train[train],
        x_test=dataset.x_test[test],
        y_test=dataset.y_test[test],
    )


def checked(where: str, arrays: Mapping[str, np.ndarray], num_classes: Any | None) -> tuple[dict[str, Any], int]:
    """Checks the four arrays of a data set, each by itself and against each other.

    Args:
      where: what the messages name, usually a file.
      arrays: `x_train`, `y_train`, `x_test`, `y_test`. Images are `[N, H, W]` or `[N, H, W, C]`, uint8 or floats in
        [0, 1]; labels are integers `[N]` or `[N, 1]`.
      num_classes: number of classes; None for max(y_train) + 1, at least 2.

    Returns:
      The arrays in the form that `Dataset` describes, and the number of classes.

    Raises:
      DataError: if `Dataset` does not allow them.
    """
    images = {split: _checked_images(where, f"x_{split}", arrays[f"x_{split}"]) for split in ("train", "test")}
    labels = {split: _checked_labels(where, f"y_{split}", arrays[f"y_{split}"], len(images[split])) for split in images}
    train, test = images["train"], images["test"]
    if train.shape[1:] != test.shape[1:]:
        raise DataError(
            f"{where}: images of x_train are {train.shape[1:]} but of x_test {test.shape[1:]}; make them equal"
        )
    if train.dtype != test.dtype:
        raise DataError(
            f"{where}: x_train is {train.dtype} but x_test {test.dtype}; store both as uint8, or both as floats in [0, 1]"
        )
    if num_classes is None:
        largest = int(np.argmax(labels["train"]))
        count, bound = max(2, int(labels["train"][largest]) + 1), "max(y_train) + 1; set num_classes for more"
        if count > max(2, len(train)):  # a stray label would make a last layer of that many classes
            raise DataError(
                f"{where}: y_train[{largest}] is {count - 1}, more classes than the {len(train)} training images; "
                f"set num_classes={count} if it is meant"
            )
    else:
        count, bound = _checked_num_classes(where, num_classes), "the file's num_classes"
    for split, values in labels.items():
        index = int(np.argmax(values))
        if values[index] >= count:
            from_one = values[index] == count and values.min() > 0
            raise DataError(
                f"{where}: y_{split}[{index}] is {values[index]}; labels must be integers in [0, {count}) "
                f"({count} is {bound}){'; if they count from 1, subtract 1' if from_one else ''}"
            )
    return {"x_train": train, "y_train": labels["train"], "x_test": test, "y_test": labels["test"]}, count


def _checked_images(where: str, member: str, images: np.ndarray) -> np.ndarray:
    """Returns images as `[N, H, W, C]` uint8, or float32 in [0, 1]."""
    if images.ndim not in (3, 4):
        raise DataError(f"{where}: {member} has shape {images.shape}; expected [N, H, W] or [N, H, W, C]")
    if images.shape[0] == 0:
        raise DataError(f"{where}: {member} holds no images (shape {images.shape}); it needs at least one")
    if 0 in images.shape:
        raise DataError(f"{where}: {member} has shape {images.shape}; height, width and channels must be at least 1")
    if images.ndim == 3:
        images = images[..., np.newaxis]
    if images.dtype == np.uint8:
        if images.max() == 1 and images.min() == 0:  # in 0..255 both are black: no image is meant so
            raise DataError(
                f"{where}: {member} is uint8 and holds 0 and 1 alone, where 255 is white; store 255 * {member}, or floats "
                f"in [0, 1] ({member}.astype(numpy.float32))"
            )
        return np.ascontiguousarray(images)
    if not np.issubdtype(images.dtype, np.floating):
        remedy = "store 0..255 as uint8 (images.astype(numpy.uint8)), or floats in [0, 1]"
        raise DataError(f"{where}: {member} is {images.dtype}; pixels must be uint8 or floating: {remedy}")
    low, high = float(images.min()), float(images.max())
    with np.errstate(over="ignore"):  # after rounding to float32, a float64 1 + 1e-12 is still 1
        inside = np.float32(low) >= 0 and np.float32(high) <= 1
    if not inside:  # NaN is never inside
        if np.isnan(low) or np.isinf(low) or np.isinf(high):
            bad = int(images.size - np.count_nonzero(np.isfinite(images)))
            remedy = f"{bad} of its {images.size} values are NaN or infinite: remove or repair them"
        elif low >= 0 and high <= 255:
            remedy = "the values look like 0..255: store them as uint8, or divide them by 255"
        else:
            remedy = "rescale them to [0, 1]"
        raise DataError(f"{where}: {member} holds pixels from {low:.6g} to {high:.6g}, outside [0, 1]; {remedy}")
    return np.ascontiguousarray(images, dtype=np.float32)


def _checked_labels(where: str, member: str, labels: np.ndarray, count: int) -> np.ndarray:
    """Returns the labels of `count` images as `[N]` int32 of at least 0."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        remedy = "; one-hot labels: use labels.argmax(axis=1)" if labels.ndim == 2 else ""
        raise DataError(f"{where}: {member} has shape {labels.shape}; expected [N] or [N, 1]{remedy}")
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"{where}: {member} is {labels.dtype}; labels must be integers in [0, K): use labels.astype(numpy.int32)"
        )
    if len(labels) != count:
        images = member.replace("y_", "x_")
        raise DataError(
            f"{where}: {member} holds {len(labels)} labels but {images} {count} images; "
            "each image needs exactly one label"
        )
    if labels[index := int(np.argmin(labels))] < 0:
        raise DataError(f"{where}: {member}[{index}] is {labels[index]}; labels must be integers in [0, K)")
    if labels[index := int(np.argmax(labels))] >= MAX_CLASSES:
        raise DataError(f"{where}: {member}[{index}] is {labels[index]}; labels must be below {MAX_CLASSES}")
    return labels.astype(np.int32)


def _checked_num_classes(where: str, value: Any) -> int:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise DataError(f"{where}: num_classes has dtype {array.dtype}, shape {array.shape}; expected one integer")
    count = int(array.reshape(()))
    if not 2 <= count <= MAX_CLASSES:
        raise DataError(f"{where}: num_classes is {count}; it must be between 2 and {MAX_CLASSES}")
    return count


def doubts(dataset: Dataset, stated: bool) -> list[str]:
    """What is most likely wrong with a data set that `checked` allows, each with what to do about it.

    Args:
      dataset: the data set.
      stated: whether the number of classes was given, not taken from the labels: then classes without images are meant.
    """
    found = [*_doubts_of_images(dataset)]
    classes = dataset.num_classes
    train, test = (set(np.unique(y).tolist()) for y in (dataset.y_train, dataset.y_test))
    enough = len(dataset.y_train) >= classes  # fewer images cannot have every class
    empty = sorted(set(range(classes)) - train) if enough or train == set(range(1, classes)) else []
    if len(train) == 1 and len(dataset.y_train) > 1:  # one image stands for none, in a file to be attacked
        found.append(f"every label of y_train is {min(train)}: store training images of all classes")
    elif empty and not stated:
        if 0 not in train | test:
            found.append(
                f"no label is 0, so class 0 of {classes} is empty: subtract 1 from labels that count from 1, or set "
                f"num_classes={classes} if it is meant"
            )
        elif empty:
            found.append(
                f"{_named(empty)} of {classes} {_have(empty)} no training image: renumber the labels without gaps "
                f"(numpy.unique(y, return_inverse=True)[1]), or set num_classes={classes} if it is meant"
            )
    elif len(train) > 1 and (lost := sorted(test.intersection(empty))):
        found.append(f"{_named(lost)} of {classes} {_have(lost)} test images but no training image: add some")
    if len(test) == 1 and len(dataset.y_test) >= 10:
        found.append(f"every label of y_test is {test.pop()}: store test images of all classes")
    return found


def _named(classes: list[int]) -> str:
    shown = ", ".join(map(str, classes[:10])) + (", ..." if len(classes) > 10 else "")
    return f"class{'es' if len(classes) > 1 else ''} {shown}"


def _have(classes: list[int]) -> str:
    return "have" if len(classes) > 1 else "has"


def _doubts_of_images(dataset: Dataset) -> list[str]:
    found: list[str] = []
    dark: dict[str, list[str]] = {}
    white = 255 if dataset.x_train.dtype == np.uint8 else 1
    for member in ("x_train", "x_test"):
        largest = getattr(dataset, member).max()
        if 0 < largest < white / 8:  # black images alone stand for none, in a file to be attacked
            twice = white == 1 and largest <= 1.001 / 255
            remedy = (
                "they were divided by 255 twice: multiply them by 255" if twice else "scale them to the whole range"
            )
            dark.setdefault(remedy, []).append(
                f"the largest pixel of {member} is {largest:.3g}, where {white} is white"
            )
    found += [f"{' and '.join(said)}: {remedy}" for remedy, said in dark.items()]
    height, *last = dataset.image_shape
    if height in (1, 3) and (last[0] == last[1] >= 8 or min(last) >= 16):
        shape = "x".join(map(str, dataset.image_shape))
        found.append(
            f"images of {shape} are read as height x width x channels: if channels come first, store "
            "x.transpose(0, 2, 3, 1)"
        )
    return found


def check_claim(where: str, dataset: Dataset) -> None:
    """Refuses a data set that has a known name but not that data set's sizes.

    Args:
      where: what the message names, usually a file.
      dataset: the data set.

    Raises:
      DataError: if the sizes or the dtype differ from those in `KNOWN`.
    """
    known = KNOWN.get(dataset.name.strip().casefold())
    if known is None:
        return
    found = Known(len(dataset.x_train), len(dataset.x_test), dataset.image_shape, dataset.num_classes)
    if found != known or dataset.x_train.dtype != np.uint8:
        raise DataError(
            f"{where}: claims to be {dataset.name}, but holds {_in_words(found)} ({dataset.x_train.dtype}) where the "
            f"official {dataset.name} holds {_in_words(known)} (uint8); drop the member metadata, or give it another "
            "name, to use the file as a data set of your own"
        )


def _in_words(sizes: Known) -> str:
    shape = "x".join(map(str, sizes.image_shape))
    return f"{sizes.train} train and {sizes.test} test images of {shape} in {sizes.num_classes} classes"
