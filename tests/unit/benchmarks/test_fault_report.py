"""What `benchmarks.faults` makes of its outcomes."""

from benchmarks.faults import __main__ as torture


def test_faults_that_prove_too_little_fail():
    about = {"date": "2026-11-25", "hardware": "CPU", "python": "3.11", "jax": "0.10", "commit": "abc"}
    kind = {"rows": [], "kills": {}, "landed": 0, "missed": 0, "wrong": 0, "environment": about}
    kind |= {"seconds": 60.0, "command": "python -m benchmarks.faults"}
    kinds = {name: kind for name in torture.ALL}

    def with_kills(landed: int, missed: int):
        killed = {"kills": {"checkpoint write": landed}, "landed": landed, "missed": missed}
        return {**kinds, "kill_training": kind | killed | {"rows": [{"fault": "f", "outcome": "o", "times": landed}]}}

    assert torture.wrong(with_kills(30, 10), 1.0) == []
    assert torture.wrong(with_kills(29, 0), 0.5) == []
    for few in (with_kills(29, 0), with_kills(60, 21)):
        (told,) = torture.wrong(few, 1.0)
        assert "they prove too little" in told
    assert torture.wrong({**kinds, "broken": kind | {"wrong": 1}}, 0.1) == ["broken: 1 wrong"]
    page = torture.markdown(with_kills(30, 2))
    assert "| kill_training | f | o | 30 |" in page
    assert "30 kills while it lived, 2 after its end" in page
    assert "| checkpoint write | 30 |" in page
    assert torture.markdown({"broken": kind}).count("Not done: kill_training, ") == 1
