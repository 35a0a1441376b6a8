"""Our attacks and the Adversarial Robustness Toolbox's, on the same weights and images.

python -m benchmarks.attack_peers --workdir=runs/natural,runs/fgsm,runs/e2sad [--examples=500]   # pip install -e '.[bench]'

Prints a Markdown page. Ends with exit code 1 if an attack of ours leaves an accuracy more than a point above the peer's, or
leaves its ball.
"""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from e2sad_jax import attacks, data
from e2sad_jax._compile import jit
from e2sad_jax.data.dataset import in_words
from e2sad_jax.errors import Error
from e2sad_jax.evaluation import Attack, Model, of_classifier
from e2sad_jax.evaluation.curves import SLACK
from e2sad_jax.reporting import provenance
from e2sad_jax.runs.classifier import Classifier, load
from experiments.step_cost.peers import PACKAGES, SHIPPED_BY, pytorch

TOLERANCE = 0.01  # of accuracy

FLAGS = flags.FLAGS
flags.DEFINE_list("workdir", [], "folders of the runs, several with commas")
flags.DEFINE_integer("examples", 500, "test images, a sample stratified by class; at least 1")
flags.DEFINE_integer("queries", 1000, "queries of Square; at least 1")
flags.DEFINE_integer("apgd_steps", 50, "steps of both APGD; at least 1")
flags.DEFINE_string("data_dir", "", "folder of data sets; empty: as the runs had it")


def ours(eps: float) -> list[Attack]:
    """The attacks that both have; DeepFool, which has no budget, is apart."""
    return [
        Attack("FGSM", "fgsm", eps, 1),
        Attack("PGD-40", "pgd", eps, 40, eps / 10),
        Attack(f"APGD-{FLAGS.apgd_steps}, cross-entropy", "apgd", eps, FLAGS.apgd_steps),
        Attack(f"APGD-{FLAGS.apgd_steps}, DLR", "apgd", eps, FLAGS.apgd_steps, loss="dlr"),
        Attack(f"Square, {FLAGS.queries:,} queries", "square", eps, FLAGS.queries),
    ]


def theirs(eps: float, classifier: Any) -> list[Callable[[], Any]]:
    """The same of ART, in the same order; each a function that builds the attack."""
    from art.attacks import evasion

    quiet = {"batch_size": 250, "verbose": False}

    def apgd(loss: str) -> Any:  # on the DLR loss ART's replaces the classifier's own
        return evasion.AutoProjectedGradientDescent(
            classifier, eps=eps, eps_step=2 * eps, max_iter=FLAGS.apgd_steps, nb_random_init=1, loss_type=loss, **quiet
        )

    return [
        lambda: evasion.FastGradientMethod(classifier, eps=eps, batch_size=250),
        lambda: evasion.ProjectedGradientDescent(
            classifier, eps=eps, eps_step=eps / 10, max_iter=40, num_random_init=1, **quiet
        ),
        lambda: apgd("cross_entropy"),
        lambda: apgd("difference_logits_ratio"),
        lambda: evasion.SquareAttack(classifier, eps=eps, max_iter=FLAGS.queries, nb_restarts=1, **quiet),
    ]


def art_classifier(trained: Classifier) -> Any:
    """The same network with the same weights, as ART takes it."""
    import torch
    from art.estimators.classification import PyTorchClassifier

    height, width, channels = trained.dataset["image_shape"]
    net = pytorch.network(
        trained.config, (height, width, channels), trained.dataset["num_classes"], jax.device_get(trained.params)
    )
    return PyTorchClassifier(
        net.eval(),
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=(channels, height, width),
        nb_classes=trained.dataset["num_classes"],
        clip_values=trained.transform.bounds,
    )


def compare(model: Model, eps: float, classifier: Any) -> list[tuple[str, float, float, float, float]]:
    """(attack, our accuracy, the peer's, our largest change of a pixel, the peer's)."""
    x = np.ascontiguousarray(model.images.transpose(0, 3, 1, 2))
    onehot = np.eye(classifier.nb_classes, dtype=np.float32)[model.labels]
    rows = []
    for attack, build in zip(ours(eps), theirs(eps, classifier), strict=True):
        right, made = model.under(attack)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            other = build().generate(x, onehot).transpose(0, 2, 3, 1)
        # Each side's images are classified by the one network.
        rows.append(
            (
                attack.name,
                float(right.mean()),
                float(model.right_on(np.asarray(other, np.float32)).mean()),
                float(np.abs(made - model.images).max()),
                float(np.abs(other - model.images).max()),
            )
        )
    return rows


def deepfool(model: Model, classifier: Any) -> tuple[float, float]:
    """Median l2 length of the change that fools the model, ours and the peer's, over the images that are right."""
    from art.attacks.evasion import DeepFool

    right = np.flatnonzero(model.clean())
    x = model.images[right]
    run = jit(lambda params, z: attacks.deepfool(lambda w: model.apply(params, w), z, steps=50, bounds=model.bounds))
    mine = np.concatenate([np.asarray(run(model.params, x[i : i + 100])) for i in range(0, len(x), 100)])
    with contextlib.redirect_stderr(io.StringIO()):
        images = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        other = DeepFool(classifier, max_iter=50, epsilon=0.02, nb_grads=10, batch_size=100, verbose=False).generate(
            images
        )
    lengths = []
    for made in (mine, other.transpose(0, 2, 3, 1)):
        length = np.linalg.norm((made - x).reshape(len(x), -1), axis=1)
        predicted = np.asarray(jit(model.apply)(model.params, np.asarray(made, np.float32))).argmax(1)
        lengths.append(float(np.median(np.where(predicted != model.labels[right], length, np.inf))))
    return lengths[0], lengths[1]


def main(argv: Sequence[str]) -> None:
    if not FLAGS.workdir:
        sys.exit("attack_peers: --workdir=: must name at least one run")
    for name in ("examples", "queries", "apgd_steps"):
        if (FLAGS[name].value or 0) < 1:
            sys.exit(f"attack_peers: --{name}={FLAGS[name].value}: must be at least 1")
    missing = [SHIPPED_BY[package] for package in PACKAGES["art"] if importlib.util.find_spec(package) is None]
    if missing:
        sys.exit(f"attack_peers: needs {' and '.join(missing)}: pip install -e '.[bench]'")
    try:
        runs = [load(workdir) for workdir in FLAGS.workdir]
    except Error as error:
        sys.exit(f"attack_peers: --workdir={','.join(FLAGS.workdir)}: {error}")
    print("# Our attacks and the Adversarial Robustness Toolbox's\n")
    print("Same weights, same images, same budgets; an accuracy is what is left under the attack, lower is stronger.\n")
    failed = []
    for trained in runs:
        dataset = data.load(trained.config.data, FLAGS.data_dir or trained.config.data_dir or None)
        sample = data.sample_tests(dataset, FLAGS.examples)
        model = of_classifier(trained, sample.x_test, sample.y_test)
        eps, classifier = trained.config.eps1, art_classifier(trained)
        shown = in_words(len(sample.y_test), len(dataset.y_test), len(np.unique(sample.y_test)), dataset.num_classes)
        print(
            f"## {trained.config.defense}, {trained.step:,} steps; {shown} of {dataset.name}, "
            f"eps {eps:.4g}, clean {model.clean().mean():.3f}\n"
        )
        print("| attack | ours | ART | our largest change | ART's |\n| --- | ---: | ---: | ---: | ---: |")
        for name, mine, other, change, their_change in compare(model, eps, classifier):
            print(f"| {name} | {mine:.3f} | {other:.3f} | {change:.6f} | {their_change:.6f} |", flush=True)
            if mine > other + TOLERANCE:
                failed.append(f"{trained.config.defense}, {name}: {mine:.3f} above {other:.3f}")
            if change > eps + SLACK:
                failed.append(f"{trained.config.defense}, {name}: {change} above eps {eps}")
        mine, other = deepfool(model, classifier)
        print(f"| DeepFool, median l2 length | {mine:.3f} | {other:.3f} | | |\n", flush=True)
        if mine > 1.05 * other:
            failed.append(f"{trained.config.defense}, DeepFool: {mine:.3f} longer than {other:.3f}")
    about = provenance.environment()
    print(f"`{provenance.command()}`, {about['hardware']}, {about['date']}, commit {about['commit']}")
    if failed:
        sys.exit("attack_peers: " + "; ".join(failed))


if __name__ == "__main__":
    app.run(main)
