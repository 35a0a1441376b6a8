"""Configurations that somebody else made, and damaged notes beside a run."""

import json
import os
import stat

import numpy as np
import pytest

import e2sad_jax
from e2sad_jax import _io
from e2sad_jax.comparison import judge
from e2sad_jax.comparison.request import Request
from e2sad_jax.errors import ConfigError, WorkdirError
from e2sad_jax.runs import folder, metrics
from e2sad_jax.runs.folder import read_config, read_training
from e2sad_jax.training import configure
from experiments.paper import cost, outcomes, page
from experiments.step_cost import request


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "too deeply"),
        ('{"a":' * 100_000, "too deeply"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        ("[NaN]", "NaN"),
        ("-Infinity", "Infinity"),
        ("[1e999]", "1e999"),
        ("9" * 19, "64 bits"),
        ("9" * 100_000, "64 bits"),
        (b"\xff\xfe", "utf-8"),
        ('"\\ud800"', "surrogates"),
        ('{"\\udfff": 1}', "surrogates"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
    ],
)
def test_json_that_programs_may_read_differently_is_refused(text, words):
    with pytest.raises(ValueError, match=words) as caught:
        _io.parse_json(text)
    assert len(str(caught.value)) < 300


def test_json_that_means_one_thing_is_read():
    value = {"é": [1, -(2**63), 2**63 - 1, 1.5, True, None, "\U0001f600", {}], "a": {"a": {"a": []}}}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False).encode()):
        assert _io.parse_json(text) == value


def test_files_beyond_their_bound_are_not_read(tmp_path, monkeypatch):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**33)  # takes no room
    with pytest.raises(WorkdirError, match=r"has 8,589,934,592 bytes, more than the 1,048,576"):
        read_config(tmp_path)
    with pytest.raises(IsADirectoryError):
        _io.read_bytes(tmp_path, 5)
    monkeypatch.setattr(
        os, "fstat", lambda descriptor: os.stat_result([stat.S_IFREG, *[0] * 9])
    )  # it says nothing, or grew
    with pytest.raises(ValueError, match="more than the 5 bytes"):
        _io.read_bytes(tmp_path / "config.json", 5)


def a_config(**changes):
    config = configure(data="tiny.npz", model="digits_cnn", steps=4, batch_size=8).to_json()
    dataset = {"name": "tiny", "sha256": "0" * 64, "image_shape": [8, 8, 1], "num_classes": 3, "version": ""}
    return {"format": 1, "config": config, "dataset": dataset} | changes


def within(part, **changes):
    return a_config(**{part: a_config()[part] | changes})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "holds a list instead of named values"),
        (a_config(format="x" * 10_000), "format x"),
        (a_config(config=[1]), "must be given by name"),
        (a_config(config=None), "must be given by name"),
        (a_config(dataset=None), "not a configuration"),
        (within("config", steps=2**62), "--steps=4611686018427387904: must be at least 1, at most"),
        (within("config", learning_rate=2**62), "--learning_rate=4611686018427387904: must be above 0, at most"),
        (within("config", epochs=1e300), "--epochs=1e+300: must be in"),
        (within("config", steps=True), "--steps=True: must be of type int"),
        (within("config", steps="4"), "--steps='4': must be of type int"),
        (within("config", data="\x1b[2J"), "must be printable"),
        (within("config", model="x" * 10_000), "must be one of"),
        (within("config", model={"a": 1}), "must be of type str"),
        (within("config", **{"y" * 10_000: 1}), "unknown setting"),
        (within("dataset", num_classes=1), "num_classes is 1; it must be from 2"),
        (within("dataset", num_classes=2**40), "num_classes is 1099511627776"),
        (within("dataset", num_classes=3.0), "num_classes is 3.0"),
        (within("dataset", image_shape=[8, 8]), "image_shape is [8, 8]; it must be [H, W, C]"),
        (within("dataset", image_shape=[8, 8, -1]), "image_shape"),
        (within("dataset", image_shape=[10**9, 10**9, 1]), "from 1 to 65,536"),
        (within("dataset", image_shape="888"), "image_shape"),
        (within("dataset", image_shape="\x1b[2J"), "image_shape is '\\x1b[2J'"),
        (within("dataset", num_classes="\x1b[2J"), "num_classes is '\\x1b[2J'"),
        (within("dataset", name="a\nb"), "name is no line of text"),
        (within("dataset", sha256=None), "sha256 is no line of text"),
    ],
)
def test_absurd_configurations_are_refused_in_one_line(tmp_path, values, words):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(WorkdirError) as caught:
        e2sad_jax.load(tmp_path)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 10**400}, "an integer of 1,329 bits"),
        ({"learning_rate": -(10**400)}, "an integer of 1,329 bits"),
        ({"seed": 10**30}, "must be in"),
        ({"epochs": 1e308}, "must be in"),
        ({"data": "a\ud800"}, "must be printable"),
    ],
)
def test_numbers_without_an_end_are_refused_like_any_other(changes, words):
    with pytest.raises(ConfigError) as caught:
        configure(**changes)
    assert words in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(WorkdirError, match="not a regular file"):
        read_config(tmp_path)


def test_messages_quote_the_beginning_of_a_long_value_alone():
    for ask in (Request, request.Request):
        field = {"entry": ("x" * 9999,)} if ask is Request else {"defense": ("x" * 9999,)}
        with pytest.raises(ConfigError, match=r"=x{100}: must be of") as caught:
            ask(**field)
        assert len(str(caught.value)) < 2000


# --- notes beside a run


DAMAGED = [b"", b"[]", b"null", b"[1]", b"{}", b"\xff", b"[" * 100_000, b'{"last": []}', b'{"asked": {}, "last": 3}']


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_notes_count_as_none(tmp_path, content):
    for name in ("training.json", "x.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes(content)
    assert read_training(tmp_path) == []
    assert judge.known_of(tmp_path / "x.json", {}, 4) == {}
    assert cost._known(tmp_path / "x.json", ["natural"]) is None
    assert outcomes.read(tmp_path / "x.json", np.arange(3)) is None
    metrics._drop_lines_after(tmp_path / "metrics.jsonl", 5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_notes_of_the_right_names_and_wrong_types_count_as_none(tmp_path):
    place = {"hardware": "CPU", "date": "2026-11-25", "commit": None}
    right = {"from_step": 0, "to_step": 4, "seconds": 1.5, "runs_together": 1, **place}
    for change in ({}, {"to_step": "4"}, {"from_step": None}, {"seconds": []}, {"runs_together": True}):
        folder.write_json(tmp_path / "training.json", [right | change])
        assert read_training(tmp_path) == ([] if change else [right])
    judged = {"step": 4, "clean": 0.9, "robust": 0.5}
    known = {"asked": {}, "last": judged, "best": judged, "chosen_on": "", "flops": 1.0, "train_seconds": 1, "eps": 0.3}
    known |= {"images": 5, "seed": 0}
    for change in ({}, {"flops": "1"}, {"best": {}}, {"last": judged | {"robust": None}}, {"chosen_on": 3}):
        folder.write_json(tmp_path / "auto.json", known | change)
        assert judge.known_of(tmp_path / "auto.json", {}, 4) == ({} if change else known)


def test_metrics_before_a_damaged_line_and_after_it_are_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n' + b"[" * 70_000 + b'\n{"step": 2}\n{"step": 9}\n{"step": 1')
    metrics._drop_lines_after(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_figure_takes_no_picture_from_another_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder = tmp_path / "small"
    folder.mkdir()
    about = {
        "title": "Figure 2: x",
        "setting": "",
        "caption": "",
        "table": {"header": [], "rows": []},
        "provenance": {},
    }
    (folder / "figure2.json").write_text(json.dumps(about | {"picture": "../secret.png"}))
    text = page.write(folder).read_text()
    assert "c2VjcmV0" not in text
    assert "cannot be read" in text
