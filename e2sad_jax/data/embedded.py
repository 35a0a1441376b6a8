"""The digits that come with this package.

They are the handwritten digits that scikit-learn distributes: the test part of "Optical Recognition of Handwritten Digits"
by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY 4.0.
"""

import pathlib

import numpy as np

from e2sad_jax.data import npz
from e2sad_jax.data.dataset import Dataset

FILE = pathlib.Path(__file__).with_name("digits.npz")


def load_digits() -> Dataset:
    """Returns the embedded digits as 28x28x1 images, so that networks for MNIST take them.

    The 8x8 images (values 0..16) are resampled with cubic splines (`scipy.ndimage.zoom`, pixels as areas), clipped to
    their range and stored as 0..255. Of each class every fifth image, in the original order, is a test image: 1,442
    train and 355 test images, with the same proportions of classes, and no random numbers.
    """
    import scipy.ndimage

    members = npz.read_members(FILE, ("images", "labels"))
    small, labels = members["images"], members["labels"].astype(np.int32)
    big = scipy.ndimage.zoom(small.astype(np.float64), (1, 3.5, 3.5), order=3, mode="reflect", grid_mode=True)
    # Rounded to 6 digits first: a last-bit difference between machines must not flip a pixel.
    images = np.rint(np.round(np.clip(big, 0, 16) * (255 / 16), 6)).astype(np.uint8)[..., np.newaxis]
    test = np.zeros(len(labels), bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[4::5]] = True
    return Dataset("digits", "", images[~test], labels[~test], images[test], labels[test], num_classes=10)
