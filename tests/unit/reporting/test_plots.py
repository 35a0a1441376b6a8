"""Pictures: labels that cover nothing, and images with their adversarial points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from e2sad_jax.reporting import plots

CROWDED = [0.0, 0.0, 0.01, 0.8, 0.81, 0.81, 0.815, 0.95]


@pytest.mark.parametrize("xs", [range(1, 9), [1, 2, 3, 3, 3.1, 3.4, 3.4, 20]])
def test_labels_cover_neither_points_nor_each_other(xs):
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(xs, CROWDED, "o")
    axes.set(xscale="log", ylim=(-0.05, 1.0), xlim=(0.8, 32))
    names = [(f"name of {i}", x, y, {"fontsize": 9}) for i, (x, y) in enumerate(zip(xs, CROWDED, strict=True))]
    plots.label_points(axes, names)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}
    assert list(boxes) == [text.get_text() for text in axes.texts]
    assert set(boxes) == {name for name, *_ in names}
    points = axes.transData.transform([(x, y) for _, x, y, _ in names])
    for i, (name, *_) in enumerate(names):
        box = boxes[name]
        assert not any(box.overlaps(other) for key, other in boxes.items() if key != name), name
        assert not any(box.contains(*point) for point in points), name
        nearest = np.clip(points[i], [box.x0, box.y0], [box.x1, box.y1])
        assert np.hypot(*(nearest - points[i])) < 25 * figure.dpi / 72, "near its point"


def test_examples_draw_one_image_of_each_class(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda path, figure, dpi: figures.append(figure))
    images = np.asarray(jax.random.uniform(jax.random.key(0), (6, 4, 4, 1)))
    labels = np.array([2, 2, 0, 1, 0, 1], np.int32)
    weights = jax.random.normal(jax.random.key(1), (16, 3))

    def apply(params, x):
        return x.reshape(len(x), -1) @ params

    plots.examples(
        tmp_path / "e.png", apply, weights, images, labels, num_classes=3, title="t", eps1=0.2, eps2=0.1, count=2
    )
    (figure,) = figures
    axes = np.array(figure.axes).reshape(5, 2)
    shown = [axes[0, i].get_images()[0].get_array() for i in range(2)]
    for picture, row in zip(shown, (2, 3), strict=True):
        np.testing.assert_allclose(picture, images[row, ..., 0], rtol=1e-6)
    guesses = np.asarray(apply(weights, jnp.asarray(images[[2, 3]]))).argmax(1)
    for ax, guess, label in zip(axes[0], guesses, (0, 1), strict=True):
        said = ax.get_title()
        assert said.startswith(f"{guess} (")
        assert said.endswith(f", not {label}") == (guess != label)
    clean, first = (axes[i, 0].get_images()[0].get_array() for i in (0, 1))
    whole = np.isclose(np.abs(first - clean), 0.2, atol=1e-5)
    assert np.all(whole | np.isclose(first, 0, atol=1e-6) | np.isclose(first, 1)), "eps1, cut at the range alone"


@pytest.mark.parametrize("inside", [False, True])
def test_examples_are_the_points_of_the_training(inside, tmp_path, monkeypatch):
    """With the robust preset both points lie in the ball of eps1; the paper's second point leaves it."""
    figures = []
    monkeypatch.setattr(plots, "save", lambda path, figure, dpi: figures.append(figure))
    images = np.full((2, 4, 4, 1), 0.5, np.float32)
    weights = jax.random.normal(jax.random.key(1), (16, 2))
    own = {"random_start": inside, "ball_second": inside, "eps1": 0.2, "eps2": 0.1, "num_classes": 2, "title": "t"}
    plots.examples(
        tmp_path / "e.png", lambda w, x: x.reshape(len(x), -1) @ w, weights, images, np.array([0, 1], np.int32), **own
    )
    axes = np.array(figures[0].axes).reshape(5, 2)
    first, second = (np.abs(axes[i, 0].get_images()[0].get_array() - 0.5).max() for i in (1, 2))
    assert 0.1 < first <= 0.2 + 1e-6
    assert (second > 0.2 + 1e-6) != inside
    assert ("random start" in axes[1, 0].get_ylabel()) == inside
