"""Draws the pictures of docs/attacks.md and docs/defenses.md: JSMA, a universal perturbation and squeezing, on the digits.

python -m benchmarks.pictures
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from e2sad_jax import attacks, data, defenses, inference, losses
from e2sad_jax.attacks.core import LogitsFn
from e2sad_jax.data import Dataset
from e2sad_jax.reporting import plots

DOCS = pathlib.Path(__file__).parents[1] / "docs"
EPS = 0.2
WRONG = "crimson"


def trained(digits: Dataset, steps: int) -> LogitsFn:
    """A dense network of one hidden layer, trained without a defense."""
    x, y = unit(np.asarray(digits.x_train)), losses.soft_labels(jnp.asarray(digits.y_train), 10, 0)
    one, two = jax.random.split(jax.random.key(0))
    params = {
        "w1": 0.05 * jax.random.normal(one, (784, 128)),
        "b1": jnp.zeros(128),
        "w2": 0.1 * jax.random.normal(two, (128, 10)),
    }
    tx = optax.adam(3e-3)

    def apply(params: Any, z: jax.Array) -> jax.Array:
        return jax.nn.relu(z.reshape(len(z), -1) @ params["w1"] + params["b1"]) @ params["w2"]

    def step(i: jax.Array, before: tuple[Any, Any]) -> tuple[Any, Any]:
        params, state = before
        rows = jax.random.randint(jax.random.fold_in(jax.random.key(1), i), (128,), 0, len(x))
        gradient = jax.grad(lambda p: defenses.natural(lambda z: apply(p, z), x[rows], y[rows])[0])(params)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(params, updates), state

    params, _ = jax.jit(lambda p: jax.lax.fori_loop(0, steps, step, (p, tx.init(p))))(params)
    return functools.partial(apply, params)


def unit(images: np.ndarray) -> jax.Array:
    """Images in [0, 1]."""
    return jnp.asarray(images, jnp.float32) / 255


def draw(axes: Any, image: Any, text: str, *, wrong: bool = False, coloured: Any = None, colour: str = WRONG) -> None:
    """A grey image below its text; pixels of `coloured` have that colour."""
    picture = np.repeat(np.clip(np.asarray(image).reshape(28, 28, 1), 0, 1), 3, 2)
    if coloured is not None:
        picture[np.asarray(coloured).reshape(28, 28)] = to_rgb(colour)
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(text, fontsize=9, color=WRONG if wrong else "black")


def name(axes: Any, text: str) -> None:
    """Names a row of pictures."""
    axes.set_ylabel(text, fontsize=9, rotation=0, ha="right", va="center", labelpad=8)


def said(logits_fn: LogitsFn, x: jax.Array) -> list[str]:
    """The class and its probability, of each image."""
    p = np.asarray(jax.nn.softmax(logits_fn(x)))
    return [f"{row.argmax()} ({row.max():.2f})" for row in p]


def jsma_steps(logits_fn: LogitsFn, x: jax.Array, theta: float) -> list[jax.Array]:
    """One image `[1, ...]` after 0, 1, 2, ... steps of JSMA towards its likeliest other class.

    A constant added to the target's logit changes no gradient, so no step. As large as what the target lacks but for a little,
    it ends the attack after the next step.
    """
    logits = logits_fn(x)[0]
    label = logits.argmax()
    target = jnp.where(jnp.arange(10) == label, -jnp.inf, logits).argmax()[None]
    own = jax.nn.one_hot(target, 10)

    @jax.jit
    def next_one(z: jax.Array) -> jax.Array:
        lacks = losses.margin(logits_fn(z), target)  # of the others over the target
        return attacks.jsma(lambda z: logits_fn(z) + (lacks - 1e-4)[:, None] * own, z, targets=target, theta=theta)

    points = [x]
    while logits_fn(points[-1]).argmax() != target[0]:
        points.append(next_one(points[-1]))
    return points


def jsma(path: pathlib.Path, logits_fn: LogitsFn, x: jax.Array) -> None:
    """Draws an image that JSMA brightens and one that it darkens, step by step."""
    figure = Figure(figsize=(6.6, 3.5), layout="constrained")
    rows = figure.subplots(2, 4)
    for row, theta, colour, what in zip(
        rows, (1.0, -1.0), ("crimson", "dodgerblue"), ("to white", "to black"), strict=True
    ):
        result = jax.jit(functools.partial(attacks.jsma, logits_fn, theta=theta))(x)
        pixels = np.asarray((result != x).reshape(len(x), -1).sum(1))
        chosen = int(np.where(pixels > 0, pixels, 785).argmin())
        points = jsma_steps(logits_fn, x[chosen : chosen + 1], theta)
        last = len(points) - 1
        for axes, step in zip(row, (0, 1, 2, last), strict=True):
            title = f"step {step}: " if step else ""
            text = title + said(logits_fn, points[step])[0]
            draw(axes, points[step], text, wrong=step == last, coloured=points[step] != points[0], colour=colour)
        name(row[0], f"two pixels\n{what}\nin each step")
    plots.save(path, figure, dpi=100)


def universal(path: pathlib.Path, logits_fn: LogitsFn, train: jax.Array, x: jax.Array) -> None:
    """Draws one universal perturbation, and images of each class that it fools."""
    classes = losses.soft_labels(logits_fn(train).argmax(-1), 10, 0)

    @jax.jit
    def made(train: jax.Array) -> jax.Array:
        return attacks.universal_pgd(
            lambda z: losses.cross_entropy(logits_fn(z), classes), train, eps=EPS, steps=40, cap=10.0
        )

    v = made(train)
    signs = EPS * jax.random.rademacher(jax.random.key(2), v.shape, v.dtype)
    rate, chance = (float(attacks.fooling_rate(logits_fn, x, change)) for change in (v, signs))
    shown = jnp.clip(x + v, 0, 1)
    before, after = (np.asarray(logits_fn(z).argmax(-1)) for z in (x, shown))
    fooled = [np.flatnonzero((before == k) & (after != k))[:1] for k in range(10)]
    chosen = np.concatenate(fooled)[:6]
    figure = Figure(figsize=(8.4, 3.0), layout="constrained")
    figure.suptitle(f"fools {rate:.0%} of {len(x)} test images; random signs of {EPS} fool {chance:.0%}", fontsize=10)
    rows = figure.subplots(2, 7)
    draw(rows[0, 0], v / (2 * EPS) + 0.5, f"v, -{EPS} to {EPS}")
    rows[1, 0].axis("off")
    for line, z, wrong in zip(rows, (x, shown), (False, True), strict=True):
        name(line[1], "x + v" if wrong else "x")
        for axes, image, text in zip(line[1:], z[chosen], said(logits_fn, z[chosen]), strict=True):
            draw(axes, image, text, wrong=wrong)
    plots.save(path, figure, dpi=100)


def squeezing(path: pathlib.Path, logits_fn: LogitsFn, x: jax.Array, labels: jax.Array) -> None:
    """Draws one image, squeezed and not: clean, after an attack on the network alone, and after one on all three at once."""
    squeezers: dict[str, Callable[[jax.Array], jax.Array]] = {
        "as it is": lambda z: z,
        "1 bit": lambda z: inference.bit_depth(z, 1),
        "2x2 median": inference.median,
    }
    views = [attacks.bpda(squeeze) for squeeze in squeezers.values()]
    near = attacks.deepfool(logits_fn, x, labels, overshoot=0.3)
    target = losses.soft_labels(logits_fn(near).argmax(-1), 10, 0)

    def loss_fn(z: jax.Array) -> jax.Array:  # all three predictions, towards one class
        return -jnp.stack([losses.cross_entropy(logits_fn(view(z)), target) for view in views]).max(0)

    both = attacks.pgd(jax.random.key(3), loss_fn, x, eps=EPS, steps=40, step_size=EPS / 10)
    stages = {"clean": x, "DeepFool,\non the network": near, f"PGD-40 at {EPS},\non network\nand squeezers": both}
    right = [[logits_fn(squeeze(z)).argmax(-1) == labels for squeeze in squeezers.values()] for z in stages.values()]
    told = [[True, True, True], [False, True, True], [False, False, False]]
    good = np.asarray(
        jnp.stack([r == t for rs, ts in zip(right, told, strict=True) for r, t in zip(rs, ts, strict=True)])
    )
    chosen = int(good.sum(0).argmax())
    figure = Figure(figsize=(5.6, 5.4), layout="constrained")
    rows = figure.subplots(3, 3)
    for row, (stage, z) in zip(rows, stages.items(), strict=True):
        image = z[chosen : chosen + 1]
        score = float(inference.squeezing_score(logits_fn, [*squeezers.values()][1:], image)[0])
        name(row[0], f"{stage}\n\nscore {score:.2f}")
        for axes, (what, squeeze) in zip(row, squeezers.items(), strict=True):
            (text,) = said(logits_fn, squeeze(image))
            draw(axes, squeeze(image), f"{what}: {text}", wrong=text[0] != str(int(labels[chosen])))
    plots.save(path, figure, dpi=100)


def main(folder: pathlib.Path, steps: int) -> None:
    """Trains the network and draws the three pictures."""
    digits = data.load("digits")
    logits_fn = trained(digits, steps)
    x, labels = unit(digits.x_test), jnp.asarray(digits.y_test)
    right = np.flatnonzero(np.asarray(logits_fn(x).argmax(-1) == labels))
    jsma(folder / "jsma.png", logits_fn, x[right[:20]])
    squeezing(folder / "squeezing.png", logits_fn, x[right[:60]], labels[right[:60]])
    universal(folder / "universal.png", logits_fn, unit(digits.x_train[:500]), x)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, default=DOCS, help="where the pictures go")
    parser.add_argument("--steps", type=int, default=300, help="training steps of 128 images")
    main(**vars(parser.parse_args()))
