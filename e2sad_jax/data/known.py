"""The data sets known by name, and their sizes."""

from typing import NamedTuple


class Known(NamedTuple):
    """What the data set of a known name holds.

    Attributes:
      train: number of training images.
      test: number of test images.
      image_shape: (H, W, C) of one image; pixels are uint8.
      num_classes: number of classes.
    """

    train: int
    test: int
    image_shape: tuple[int, int, int]
    num_classes: int = 10


# A file that claims one of these names must hold all of it, so that no report shows a part of MNIST as MNIST.
KNOWN: dict[str, Known] = {
    "mnist": Known(60_000, 10_000, (28, 28, 1)),
    "svhn": Known(73_257, 26_032, (32, 32, 3)),
    "svhn_extra": Known(604_388, 26_032, (32, 32, 3)),
    "cifar10": Known(50_000, 10_000, (32, 32, 3)),
    "cifar100": Known(50_000, 10_000, (32, 32, 3), 100),
    "digits": Known(1_442, 355, (28, 28, 1)),
}
