"""A run that learns from a teacher: which is trained first or given, and is what the run has begun with, for good."""

import json
import shutil

import chex
import jax
import numpy as np
import pytest

import e2sad_jax
from e2sad_jax._io import sealed, unsealed
from e2sad_jax.errors import ConfigError, WorkdirError
from e2sad_jax.runs import opening, trainer
from e2sad_jax.runs.teacher import FILE, read_logits
from tests.helpers import mostly_slow
from tests.unit.runs.helpers import config_of, stop_after

T = 20.0
pytestmark = pytest.mark.usefixtures("scores")


def run(config, dataset, stop=lambda: 0):
    """Trains as far as it gets; the state on the host."""
    with opening.open_run(config, dataset) as opened:
        return jax.device_get(trainer.train(opened, stop)[0].params)


def student_of(workdir, **changes):
    return config_of(workdir, defense="distillation", temperature=T, **changes)


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory, linear):
    """The folder of a trained teacher; to be copied, not changed."""
    workdir = tmp_path_factory.mktemp("teacher") / "t"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "validate", lambda run, state, stop: {"score": 0.0})
        run(config_of(workdir, defense="tempered", temperature=T, soft_label=False), tiny)
    return workdir


@pytest.fixture(scope="module")
def whole(teacher, tiny, tmp_path_factory):
    """Parameters of a student of that teacher, whose training nobody stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "validate", lambda run, state, stop: {"score": 0.0})
        return run(student_of(tmp_path_factory.mktemp("student") / "w", teacher=str(teacher)), tiny)


def test_the_run_keeps_its_teachers_logits(teacher, tiny, tmp_path):
    """By another way: the probabilities that the loaded teacher gives, of training images that are not held out."""
    run(student_of(tmp_path / "w", teacher=str(teacher), validation_examples=10), tiny)
    logits = read_logits(tmp_path / "w")
    assert logits.shape == (len(tiny.x_train) - 10, 3)
    assert logits.dtype == np.float32
    with opening.open_run(student_of(tmp_path / "w", teacher=str(teacher), validation_examples=10), tiny) as opened:
        images = opened.train_set.x_train
    wanted = np.asarray(e2sad_jax.load(teacher)(images))
    np.testing.assert_allclose(np.asarray(jax.nn.softmax(logits)), wanted, atol=1e-6)
    assert len(np.unique(wanted.argmax(1))) > 1


def test_without_a_named_teacher_one_is_trained_first(teacher, whole, tiny, tmp_path):
    """The same one as by hand, with hard labels, in a folder of its own; and the same student."""
    alone = run(student_of(tmp_path / "alone"), tiny)
    chex.assert_trees_all_equal(alone, whole)
    first, second = (e2sad_jax.load(folder).params for folder in (teacher, tmp_path / "alone" / "teacher"))
    chex.assert_trees_all_equal(jax.device_get(first), jax.device_get(second))
    natural = run(config_of(tmp_path / "natural", soft_label=False), tiny)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(*map(jax.tree.leaves, (natural, alone)), strict=True))


@pytest.mark.parametrize("times", mostly_slow([1, 7, 15, 18], [7]))
def test_stopped_and_resumed_it_ends_bit_for_bit_as_uninterrupted(times, whole, tiny, tmp_path):
    """While the teacher trains (12 steps), at its end, and while the student does."""
    config = student_of(tmp_path / "w")
    stop = stop_after(times)
    run(config, tiny, stop)
    assert stop(), "it was stopped"
    chex.assert_trees_all_equal(run(config, tiny), whole)


def test_once_begun_the_teachers_folder_may_go(teacher, whole, tiny, tmp_path):
    own = shutil.copytree(teacher, tmp_path / "t")
    config = student_of(tmp_path / "w", teacher=str(own))
    run(config, tiny, stop_after(4))
    shutil.rmtree(own)
    chex.assert_trees_all_equal(run(config, tiny), whole)
    shutil.rmtree(tmp_path / "w")
    with pytest.raises(ConfigError, match=r"--teacher=.*t: .*config.json does not exist"):
        run(config, tiny)


def test_the_teacher_is_a_part_of_the_run(teacher, tiny, tmp_path):
    """By its folder's name, and by what lies in it."""
    own = tmp_path / "t"
    shutil.copytree(teacher, own)
    config = student_of(tmp_path / "w", teacher=str(own))
    assert (
        config.digest() != student_of(tmp_path / "w", teacher="other").digest() != student_of(tmp_path / "w").digest()
    )
    run(config, tiny, stop_after(4))
    shutil.rmtree(own)
    run(config_of(own, defense="tempered", temperature=T, soft_label=False, seed=1), tiny)
    with pytest.raises(WorkdirError, match=r"learns from another teacher than .*; choose another --workdir"):
        run(config, tiny)


def test_a_teacher_that_does_not_fit_is_refused(teacher, tiny, tmp_path):
    """Before anything is trained."""
    config = student_of(tmp_path / "w", teacher=str(teacher))
    path = teacher / "config.json"
    whole = json.loads(path.read_text())

    def with_other(**dataset):
        values = unsealed(whole)
        other = shutil.copytree(teacher, tmp_path / next(iter(dataset)))
        (other / "config.json").write_text(json.dumps(sealed({**values, "dataset": {**values["dataset"], **dataset}})))
        return student_of(tmp_path / "w", teacher=str(other))

    for wrong, message in (
        (student_of(tmp_path / "w", teacher="nowhere"), r"--teacher=nowhere: nowhere/config.json does not exist"),
        (with_other(num_classes=10), r"its number of classes is 10, this run's 3; they must be the same"),
        (with_other(image_shape=[28, 28, 1]), r"its shape of images is \[28, 28, 1\], this run's \[8, 8, 1\]"),
        (config.replace(temperature=5.0), r"its temperature is 20.0, this run's 5.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(wrong, tiny)
    empty = tmp_path / "empty"
    shutil.copytree(teacher, empty, ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(ConfigError, match=r"--teacher=.*empty: holds no checkpoint yet; train it first"):
        run(student_of(tmp_path / "w", teacher=str(empty)), tiny)


def test_a_damaged_file_is_refused(teacher, tiny, tmp_path):
    config = student_of(tmp_path / "w", teacher=str(teacher))
    run(config, tiny, stop_after(4))
    (tmp_path / "w" / FILE).write_bytes(b"nothing")
    with pytest.raises(WorkdirError, match=r"teacher.npz: not an npz file.*; delete the file to ask the teacher again"):
        run(config, tiny)
