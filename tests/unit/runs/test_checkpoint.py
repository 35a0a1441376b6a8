"""Checkpoints: the last and the best are kept, whole; one that does not hold what was saved is refused."""

import errno
import functools
import json
import os
import pathlib
import random
import re
import shutil

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from benchmarks.faults.damage import flip, truncate
from e2sad_jax import errors, networks, training
from e2sad_jax._io import sealed, write_json
from e2sad_jax.errors import CheckpointError, DamagedError, Stopped, WorkdirError
from e2sad_jax.runs import checkpoint
from e2sad_jax.runs.checkpoint import Checkpoints, digest, quarantine_damaged, state_digest
from e2sad_jax.runs.folder import steps_in
from tests.unit.runs.helpers import SHAPE, config_of, state_of
from tests.unit.runs.test_folder import damages

CONFIG = config_of(pathlib.Path("nowhere"))
METRICS = {"score": 0.0, "seconds": 1.5}
state_at = functools.partial(state_of, CONFIG)


@functools.cache
def like() -> training.TrainState:
    """The shapes of a state."""
    return jax.eval_shape(state_at)


def first_leaf(state: training.TrainState) -> np.ndarray:
    return np.asarray(jax.tree.leaves(state.params)[0])


@pytest.fixture
def workdir(trained, tmp_path) -> pathlib.Path:
    """A copy of a run with checkpoints of the steps 10, the best, and 12."""
    shutil.copytree(trained, tmp_path / "w")
    return tmp_path / "w"


def test_last_and_best_are_kept_and_nothing_else(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.last_step is None
        with pytest.raises(WorkdirError, match="holds no checkpoint yet"):
            checkpoints.restore(like())
        for step, score in [(1, 5.0), (2, 9.0), (3, 7.0), (4, 8.0)]:
            checkpoints.save(step, state_at(step), {"score": score, "seconds": 1.5})
        checkpoints.wait()
        assert (checkpoints.last_step, checkpoints.best_step) == (4, 2)
    with Checkpoints(tmp_path) as checkpoints:  # another process later
        assert sorted(p.name for p in checkpoints.folder.iterdir() if p.name.isdigit()) == ["2", "4"]
        assert not (checkpoints.folder / checkpoint.DELETED).exists()
        assert (checkpoints.seconds(4), checkpoints.score(2)) == (1.5, 9.0)
        for step in (2, 4):
            restored = checkpoints.restore(like(), step)
            assert int(restored.step) == step
            np.testing.assert_array_equal(first_leaf(restored), first_leaf(state_at(step)))
            chex.assert_trees_all_equal(jax.random.key_data(restored.key), jax.random.key_data(state_at(step).key))
    assert state_digest(tmp_path, 3) is None
    assert state_digest(tmp_path, 2) != state_digest(tmp_path, 4)


def test_a_checkpoint_of_an_orbax_that_did_not_name_its_format_is_read(workdir):
    """Orbax 0.11.30, the earliest that is allowed, writes no `use_ocdbt`, and goes by the files."""
    path = workdir / "checkpoints/12/default/_METADATA"
    metadata = json.loads(path.read_text())
    metadata.pop("use_ocdbt", None)
    path.write_text(json.dumps(metadata))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert int(checkpoints.restore(like()).step) == 12


def test_a_memory_with_the_axes_of_its_images_is_read(tmp_path):
    """As checkpoints had it once."""
    config = config_of(tmp_path, defense="pgd", memory="int8")
    state = training.init_state(config, networks.create(config.model, 3, SHAPE), SHAPE, 50)
    rows = state.memory["delta"]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state.replace(memory={"delta": rows.reshape(-1, *SHAPE)}), METRICS)
        checkpoints.wait()
        assert rows.shape == (64, 64)
        restored = checkpoints.restore(jax.eval_shape(lambda: state))
        np.testing.assert_array_equal(restored.memory["delta"], rows)
        fewer = {"delta": rows[:48]}
        with pytest.raises(DamagedError):
            checkpoints.restore(jax.eval_shape(lambda: state.replace(memory=fewer)))


def test_a_checkpoint_holds_the_same_parts_in_later_versions():
    parts = {"step", "params", "opt_state", "key"}
    assert set(jax.eval_shape(lambda: checkpoint._storable(state_at()))) == parts
    free = config_of(pathlib.Path("nowhere"), defense="free")
    assert set(jax.eval_shape(lambda: checkpoint._storable(state_of(free)))) == {*parts, "delta"}


def test_a_checkpoint_is_numbers_by_names_that_no_version_of_jax_makes_up():
    """So one version of JAX reads what another wrote: the random key is two integers, and digests name parts as here."""
    stored = checkpoint._storable(state_at())
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(stored)]
    layer = [f"['params']['Dense_0']['{name}']" for name in ("bias", "kernel")]
    moments = [f"['opt_state'][0].{moment}{name}" for moment in ("mu", "nu") for name in layer]
    assert names == [
        "['key']",
        "['opt_state'][0].count",
        *moments,
        *(f"['params']{name}" for name in layer),
        "['step']",
    ]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(stored)} == {"uint32", "int32", "float32"}
    assert stored["key"].shape == (2,)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(checkpoint._storable(state_at())["key"], stored["key"])


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    """The write goes on in the background: it must not see what the next steps make of the buffers."""
    state = state_at(1)
    before = first_leaf(state).copy()
    scramble = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, METRICS)
        params = state.params
        for _ in range(20):
            params = scramble(params)
        checkpoints.wait()
        np.testing.assert_array_equal(first_leaf(checkpoints.restore(like())), before)


def test_a_half_written_checkpoint_is_not_trusted(workdir):
    """What a killed process leaves: Orbax's temporary folder beside the last whole one."""
    torn = workdir / "checkpoints" / "15.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "default").write_bytes(b"torn")
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.last_step == 12
        assert int(checkpoints.restore(like()).step) == 12


def test_a_checkpoint_of_another_network_is_refused(workdir):
    other = jax.eval_shape(lambda: training.init_state(CONFIG, networks.create("digits_cnn", 5, SHAPE), SHAPE))
    with Checkpoints(workdir, read_only=True) as checkpoints, pytest.raises(WorkdirError, match=r"checkpoints/12"):
        checkpoints.restore(other)


def test_who_only_reads_changes_nothing(workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with Checkpoints(workdir, read_only=True) as checkpoints:
        checkpoints.restore(like(), checkpoints.best_step)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


# Damage.


def test_no_damage_to_a_checkpoint_gives_other_numbers(workdir):
    rng = random.Random(0)
    shutil.rmtree(workdir / "checkpoints" / "12")
    with Checkpoints(workdir, read_only=True) as checkpoints:
        whole = digest(checkpoints.restore(like()).params)
    refused = []
    files = [path for path in (workdir / "checkpoints").rglob("*") if path.is_file() and path.stat().st_size]
    for path in files:
        content = path.read_bytes()
        for damaged in damages(rng, content, 1 if path.stat().st_size < 1000 else 3)[:-1]:
            path.write_bytes(damaged)
            try:
                with Checkpoints(workdir, read_only=True) as checkpoints:
                    assert digest(checkpoints.restore(like()).params) == whole, path
            except WorkdirError as error:
                refused.append(str(error))
        path.write_bytes(content)
    assert len(refused) > len(files) / 2
    assert all(map(str.isprintable, refused))


def test_numbers_that_orbax_takes_for_whole_are_compared_with_what_was_saved(workdir):
    """Another state in the place of the one that was saved, each of its files whole."""
    kept = workdir / "checkpoints"
    shutil.rmtree(kept / "12" / "default")
    shutil.copytree(kept / "10" / "default", kept / "12" / "default")
    with (
        Checkpoints(workdir, read_only=True) as checkpoints,
        pytest.raises(DamagedError, match=r"checkpoints/12: its numbers are not those that were saved; .*delete that"),
    ):
        checkpoints.restore(like())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (sealed({"score": 1.0}), "without seconds, state_sha256"),
        ({"score": 1.5, "seconds": 7.0}, "damaged, or edited"),
        ([], "holds a list"),
        (None, "No such file"),
    ],
)
def test_metrics_that_are_not_what_was_written_are_refused(content, words, workdir):
    path = workdir / "checkpoints/12/metrics/metrics"
    path.unlink() if content is None else write_json(path, content)
    with pytest.raises(DamagedError, match=rf"checkpoints/12: metrics: .*{words}"):
        Checkpoints(workdir, read_only=True)


@pytest.mark.parametrize("what", ["metrics/metrics", "default/manifest.ocdbt"])
@pytest.mark.parametrize("damage", [flip, truncate])
def test_a_damaged_last_checkpoint_is_moved_aside_with_a_warning(what, damage, workdir, capsys):
    damage(workdir / "checkpoints" / "12" / what, random.Random(1))
    quarantine_damaged(workdir, like())
    said = capsys.readouterr().err
    assert "warning: the checkpoint of step 12 is damaged (" in said
    assert said.endswith("training resumes from the one of step 10\n")
    assert (workdir / "checkpoints" / "12.damaged").is_dir(), "for who wants to look at it"
    assert steps_in(workdir) == [10]
    quarantine_damaged(workdir, like())
    assert capsys.readouterr().err == ""


def test_a_damaged_best_or_only_checkpoint_is_refused(workdir):
    """The best of what is left would be another result."""
    truncate(workdir / "checkpoints/10/metrics/metrics", random.Random(0))
    words = r"cannot read the checkpoint .*checkpoints/10: .*delete that folder to "
    with pytest.raises(DamagedError, match=words):
        quarantine_damaged(workdir, like())
    shutil.rmtree(workdir / "checkpoints" / "10")
    truncate(workdir / "checkpoints/12/default/manifest.ocdbt", random.Random(0))
    with pytest.raises(DamagedError, match="checkpoints/12"):
        quarantine_damaged(workdir, like())
    assert steps_in(workdir) == [12]


# A full disk.


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_in_one_line_and_keeps_what_was_saved(workdir, monkeypatch):
    with Checkpoints(workdir) as checkpoints:
        monkeypatch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(CheckpointError, match=f"cannot write .*: {errors.FULL}; earlier checkpoints stay"):
            checkpoints.save(13, state_at(13), METRICS)
    assert steps_in(workdir) == [10, 12]


def test_a_full_disk_that_is_found_at_the_end_is_told_in_the_same_words(tmp_path, monkeypatch, capsys):
    close = ocp.CheckpointManager.close

    def closing(self) -> None:
        close(self)
        full()

    monkeypatch.setattr(ocp.CheckpointManager, "close", closing)
    with pytest.raises(CheckpointError, match=f"cannot write .* {errors.FULL}; earlier"), Checkpoints(tmp_path):
        pass
    with pytest.raises(Stopped, match="by a signal"), Checkpoints(tmp_path):
        raise Stopped("by a signal", 15)
    assert re.fullmatch(f"warning: cannot write .* {errors.FULL}; earlier.*\n", capsys.readouterr().err)
