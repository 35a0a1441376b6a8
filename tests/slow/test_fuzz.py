"""The harness that damages inputs: each kind of misbehaviour is found, and a short run of it finds none."""

import collections
import pathlib
import pickle
import random
import time
import warnings

import pytest

from benchmarks.faults import fuzz
from benchmarks.faults.fuzz import Refused, Wrong
from e2sad_jax.errors import ConfigError, DataError

WHICH = {random.Random(f"0 bad {i}").random(): i for i in range(12)}


class Canary:
    def __reduce__(self):
        return sorted, ((),)


class Bad:
    """Misbehaves in another way with every input, and at the end not at all."""

    name, share = "bad", 1.0

    def __init__(self, folder):
        pass

    def input(self, rng):
        return "any", WHICH.get(rng.random(), -1)

    def save(self, given, path):
        path.write_text(str(given))

    def run(self, given):
        match given:
            case 0:
                raise KeyError("x_train")
            case 1:
                time.sleep(60)
            case 2:
                warnings.warn("a word too much", stacklevel=1)
            case 3:
                len(bytearray(8 * 2**30))
            case 4:
                pickle.loads(pickle.dumps(Canary()))
            case 5:
                with open("/etc/passwd"):
                    pass
            case 6:
                exec("1 + 1")
            case 7:
                return Refused(DataError("two\nlines"))
            case 8:
                raise Wrong("not what the file says")
            case 9:
                try:
                    raise MemoryError
                except MemoryError as error:
                    try:
                        raise DataError("cannot be read") from error
                    except DataError as refused:
                        return Refused(refused)
            case 10:
                return Refused(ConfigError("--steps=0: must be at least 1"))
        return given


def test_every_kind_of_misbehaviour_is_found(tmp_path):
    counts, findings = fuzz.fuzz([("bad", 0, 12)], {"bad": Bad}, keep=tmp_path, say=lambda line: None, limit=2)
    found = {finding.index: finding.what for finding in findings}
    words = {
        **{0: "KeyError: 'x_train' (test_fuzz.py", 1: "not done after 2 s", 2: "a word too much", 3: "MemoryError"},
        **{
            4: "pickle.find_class",
            5: "open /etc/passwd",
            6: "exec",
            7: "message: 'two\\nlines'",
            8: "not what the file",
        },
        9: "ran out of memory",
    }
    assert found.keys() == words.keys()
    for index, word in words.items():
        assert word in found[index]
    assert counts == {
        "bad": collections.Counter(
            {("any", "found"): 9, ("lost", "found"): 1, ("any", "refused"): 1, ("any", "accepted"): 1}
        )
    }
    assert {path.name for path in tmp_path.iterdir()} == {f"bad-{index}" for index in words if index != 1}


@pytest.mark.parametrize("bug", ["raises", "wrong", "none"])
def test_a_bug_in_the_reader_is_found(tmp_path, monkeypatch, bug):
    """Of data sets that nobody has damaged much, some are read."""
    from benchmarks.faults.fuzzing import npz

    reader = npz.load_npz

    def planted(path: pathlib.Path):
        dataset = reader(path)
        if bug == "raises":
            raise KeyError("x_train")
        if bug == "wrong":
            object.__setattr__(dataset, "x_test", dataset.x_test[::-1].copy())
        return dataset

    monkeypatch.setattr(npz, "load_npz", planted)
    target = npz.Npz(tmp_path)
    wrong = [what for i in range(60) if (what := fuzz.attempt(target, 0, i)[2])]
    assert bool(wrong) == (bug != "none")
    assert all(("KeyError" if bug == "raises" else "x_test is not what numpy reads") in what for what in wrong)


def test_a_short_run_finds_nothing(tmp_path):
    from benchmarks.faults.fuzzing import TARGETS

    work = fuzz.plan(300, {name: target.share for name, target in TARGETS.items()})
    counts, findings = fuzz.fuzz(work, TARGETS, keep=tmp_path, say=lambda line: None)
    assert findings == []
    assert sum(kinds.total() for kinds in counts.values()) == 300
    for name, kinds in counts.items():
        outcomes = {outcome for _, outcome in kinds}
        assert "refused" in outcomes
        assert "accepted" in outcomes or name == "checkpoint", name  # there are four of those


def test_the_page_says_what_was_found():
    row = {"inputs": 3, "accepted": 1, "refused": 1, "found": 1}
    finding = {"target": "npz", "index": 7, "kind": "zip", "what": "KeyError"}
    about = {"date": "2026-11-25", "hardware": "CPU", "python": "3.11", "jax": "0.10", "commit": "abc"}
    result = {"inputs": 3, "totals": {"npz": row}, "targets": {"npz": {"zip": row}}, "findings": [finding]}
    page = fuzz.markdown(result | {"seconds": 1.0, "command": "python -m benchmarks.fuzz", "environment": about})
    assert "| npz | zip | 3 | 1 | 1 | 1 |" in page
    assert "- npz:7 (zip): KeyError" in page
    assert "commit abc" in page
