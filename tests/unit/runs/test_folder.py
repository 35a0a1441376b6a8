"""A run's folder: whose it is, what is refused, and files that were damaged."""

import dataclasses
import json
import os
import random

import pytest

from e2sad_jax._io import LOCK, sealed, write_json
from e2sad_jax.errors import GoneError, WorkdirError
from e2sad_jax.runs import folder
from e2sad_jax.runs.folder import read_config, read_training
from tests.unit.runs.helpers import config_of

PLACE = {"hardware": "CPU", "date": "2026-11-25", "commit": None}


def damages(rng: random.Random, content: bytes, times: int) -> list[bytes]:
    """Flipped bits and truncations of a file."""
    damaged = []
    for _ in range(times):
        place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        damaged.append(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
    return [*damaged, content[: rng.randrange(len(content))], b""]


@pytest.fixture
def workdir(tiny, tmp_path):
    """With the config.json of a run."""
    folder.write_config(tmp_path, config_of(tmp_path), tiny)
    return tmp_path


def test_config_and_data_set_are_read_as_written(workdir, tiny):
    config, dataset = read_config(workdir)
    assert config == config_of(workdir)
    assert dataset == folder.describe_dataset(tiny)
    assert (dataset["image_shape"], dataset["num_classes"], dataset["train_examples"]) == ([8, 8, 1], 3, 50)


def test_every_flipped_bit_and_every_cut_of_config_json_is_seen(workdir):
    content, right = (workdir / "config.json").read_bytes(), read_config(workdir)
    seen = []
    for damaged in damages(random.Random(0), content, 500):
        (workdir / "config.json").write_bytes(damaged)
        try:
            assert read_config(workdir) == right, damaged
        except WorkdirError as error:
            seen.append(str(error))
    assert all(map(str.isprintable, seen))
    assert len(seen) > 300, "the others are spaces, and letters of what nobody reads"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "holds a list instead of named values"),
        ({"format": 1}, "damaged, or edited"),
        (sealed({"format": 99}), "has format 99, this version reads 1"),
        (sealed({"format": "x" * 10_000}), "has format x"),
        (sealed({"format": 1, "dataset": {}, "config": {}}), "without image_shape, name, num_classes, sha256"),
        (sealed({"format": 1, "dataset": None, "config": {}}), "is not a configuration of this version"),
    ],
)
def test_what_is_no_configuration_is_refused_in_one_line(values, words, tmp_path):
    write_json(tmp_path / "config.json", values)
    with pytest.raises(WorkdirError) as caught:
        read_config(tmp_path)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_an_unknown_setting_is_named(workdir):
    values = json.loads((workdir / "config.json").read_text())
    values.pop("sha256")
    values["config"]["defence"] = "e2sad"
    write_json(workdir / "config.json", sealed(values))
    with pytest.raises(WorkdirError, match="unknown setting 'defence'"):
        read_config(workdir)


def test_files_beyond_their_bound_and_pipes_are_not_read(tmp_path):
    with pytest.raises(WorkdirError, match="is not the workdir of a run"):
        read_config(tmp_path)
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**33)  # takes no room
    with pytest.raises(WorkdirError, match=r"has 8,589,934,592 bytes, more than the 1,048,576"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(WorkdirError, match="not a regular file"):
        read_config(tmp_path)


def test_a_workdir_of_other_settings_or_data_is_refused_naming_what_differs(workdir, tiny):
    config = config_of(workdir)
    folder.check_workdir(workdir, dataclasses.replace(config, steps=99, log_every=1), tiny)
    with pytest.raises(WorkdirError, match=r"another run \(--batch_size: 16 there, 8 here; --seed: 0 there, 3 here\)"):
        folder.check_workdir(workdir, dataclasses.replace(config, batch_size=8, seed=3), tiny)
    other = dataclasses.replace(tiny, x_train=255 - tiny.x_train)
    with pytest.raises(WorkdirError, match=r"tiny there, tiny here, with other content"):
        folder.check_workdir(workdir, config, other)


def test_a_folder_of_other_files_is_left_alone_and_one_begun_is_taken(tiny, tmp_path):
    config = config_of(tmp_path / "w")
    (tmp_path / "w").mkdir()
    for name in (LOCK, ".config.json.12.tmp"):
        (tmp_path / "w" / name).write_text("")
    with folder.open_workdir(tmp_path / "w", config, tiny):
        pass
    (tmp_path / "w" / "thesis.txt").write_text("precious")
    with pytest.raises(WorkdirError, match=r"is not empty and holds no config.json"):
        folder.open_workdir(tmp_path / "w", config, tiny).__enter__()
    with pytest.raises(WorkdirError, match=r"cannot use .* as workdir: (File exists|Not a directory)"):
        folder.open_workdir(tmp_path / "w" / "thesis.txt", config, tiny).__enter__()


def test_a_second_process_is_kept_out(workdir, tiny):
    config = config_of(workdir)
    with folder.open_workdir(workdir, config, tiny), pytest.raises(WorkdirError, match="another process is at work in"):
        folder.open_workdir(workdir, config, tiny).__enter__()
    with folder.open_workdir(workdir, config, tiny):
        pass


def test_a_folder_that_is_gone_is_named(workdir):
    folder.ensure_exists(workdir)
    (workdir / "config.json").unlink()
    with pytest.raises(GoneError, match="was deleted or moved while the run was at work in it"):
        folder.ensure_exists(workdir)


def test_steps_are_those_of_whole_checkpoints_in_their_order(tmp_path):
    for name in ("10", "9", "12.damaged", "11.orbax-checkpoint-tmp", "007", "²", "٣", "deleted"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert folder.steps_in(tmp_path) == [9, 10]
    assert folder.steps_in(tmp_path / "nowhere") == []


def segment(**changes):
    return {"from_step": 0, "to_step": 4, "seconds": 1.5, "runs_together": 1, **PLACE, **changes}


def test_training_json_has_a_segment_for_each_process_and_none_for_steps_that_were_lost(tmp_path):
    folder.note_training(tmp_path, segment())
    folder.note_training(tmp_path, segment(to_step=8))  # the same process, later
    folder.note_training(tmp_path, segment(from_step=6, to_step=10))  # steps 7 and 8 were lost with the first
    assert read_training(tmp_path) == [segment(to_step=6), segment(from_step=6, to_step=10)]


def test_a_damaged_training_json_counts_as_none_and_is_named(tmp_path, capsys):
    folder.note_training(tmp_path, segment())
    path = tmp_path / folder.TRAINING
    for damaged in damages(random.Random(0), path.read_bytes(), 100):
        path.write_bytes(damaged)
        assert read_training(tmp_path) in ([], [segment()]), damaged
    for damaged in (b"[]", b"null", b"[1]", b"{}", b"\xff", b"[" * 100_000):
        path.write_bytes(damaged)
        assert read_training(tmp_path) == []
    folder.note_training(tmp_path, segment(from_step=4, to_step=8))
    assert f"warning: {path} is damaged" in capsys.readouterr().err
