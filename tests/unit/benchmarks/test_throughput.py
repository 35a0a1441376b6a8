"""benchmarks.throughput: both paths train, reading alone is counted, and the page has what was measured."""

import os

import pytest

from benchmarks import throughput
from benchmarks.results import provenance_of
from e2sad_jax._io import read_json
from e2sad_jax.errors import ConfigError
from e2sad_jax.training import stream


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "vgg"}, "--model='?vgg'?: must be "),
        *(({n: 0}, f"--{n}=0: must be at least 1") for n in ("steps", "images")),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_in_one_line(given, message):
    with pytest.raises(ConfigError, match=message):
        throughput.Request(**given)


@pytest.mark.usefixtures("all_unoptimized", "standard_promotion")
def test_both_paths_and_reading_are_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os, "posix_fadvise", lambda *a: None, raising=False)  # not everywhere
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    read = []
    before = stream.Stream._read
    monkeypatch.setattr(
        stream.Stream, "_read", lambda self, rows, first: read.append(first) or before(self, rows, first)
    )
    asked = throughput.Request(model="digits_cnn", batch_size=2, images=5, steps=3, results=str(tmp_path))
    throughput.run(asked)
    # The device's path reads nothing, the host's one step that is not timed too, and reading alone, twice, those that are.
    assert sorted(read) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    result = read_json(tmp_path / "throughput.json")
    assert set(result["images_per_second"]) == {"--resident=device", "--resident=host", *throughput.READING}
    assert min(result["images_per_second"].values()) > 0
    page = (tmp_path / "throughput.md").read_text()
    assert page in capsys.readouterr().out
    assert "natural, `digits_cnn`, 3 steps of 2, 5 images of 784 bytes." in page


def test_rates_are_images_over_seconds():
    about = {"hardware": "CPU", "date": "2026-11-30 10:00 UTC", "commit": "abc", "jax": "0.10.2"}
    result = {
        "command": "python -m benchmarks.throughput",
        "environment": about,
        "request": {"defense": "natural", "model": "m", "width": 16, "steps": 10, "batch_size": 4, "images": 100},
        "image_bytes": 3072,
        "images_per_second": {"--resident=host": 1000.0},
    }
    page = throughput.page(result)
    assert "`m` of width 16" in page
    assert "| --resident=host | 1,000 | 3.1 |" in page
    assert [found["commit"] for found in provenance_of(result)] == ["abc"]
