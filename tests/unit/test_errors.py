"""What messages quote: one printable line, short whatever it is."""

import pathlib
import pickle

import pytest

from e2sad_jax import errors


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a", "'a'"),
        (3, "3"),
        (1.5, "1.5"),
        ([1, "a"], "[1, 'a']"),
        (10**400, "an integer of 1,329 bits"),
        (-(10**41), "an integer of 137 bits"),
        ("\x1b[2J", "'\\x1b[2J'"),
        ("é", "'é'"),
        ("a\ud800", "'a\\ud800'"),
        ("x" * 9999, "'" + "x" * 59 + " ... " + "x" * 59 + "'"),
    ],
)
def test_a_value_is_quoted_in_short(value, shown):
    assert errors.quoted(value) == shown


def test_an_error_of_another_library_is_one_line():
    assert errors.first_line(ValueError("  first \t line\nsecond")) == "first line"
    assert errors.first_line(ValueError("")) == "ValueError"
    assert errors.first_line(OSError("\x1b[2J")) == "\\x1b[2J"
    long = errors.first_line(RuntimeError("a" * 1000 + "b" * 1000))
    assert long == "a" * 150 + " ... " + "b" * 150
    assert errors.first_line(RuntimeError("abcdef"), 4) == "ab ... ef"


def test_a_full_disk_is_named_alone():
    assert errors.reason(ValueError("RESOURCE_EXHAUSTED: x; No space left on device; y")) == errors.FULL
    assert errors.reason(ValueError("other\nlines")) == "other"


def every_error(base=errors.Error):
    return [base, *(error for child in base.__subclasses__() for error in every_error(child))]


def test_every_error_has_an_exit_code_and_a_message():
    codes = {}
    for kind in set(every_error()):
        arguments = {errors.DamagedError: (pathlib.Path("w"), "why"), errors.Stopped: ("why", 15)}.get(kind, ("why",))
        error = kind(*arguments)
        assert "why" in str(error)
        assert kind.__doc__
        codes[kind.__name__] = error.exit_code
    assert codes["ConfigError"] == codes["DataError"] == codes["WorkdirError"] == codes["BusyError"] == 2
    assert codes["Stopped"] == 128 + 15
    alone = ("NonFiniteError", "OutOfTimeError", "LostProcessError", "OutOfMemoryError", "DeviceError")
    assert [codes[name] for name in alone] == [3, 4, 5, 6, 7]
    assert min(codes.values()) >= 1


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (MemoryError(), errors.OutOfMemoryError),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), errors.OutOfMemoryError),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory"), errors.OutOfMemoryError),
        (RuntimeError("INTERNAL: ECC error"), errors.DeviceError),
        (RuntimeError("INVALID_ARGUMENT: shapes"), None),
        (ValueError("INTERNAL: not of a device"), None),
        (OSError("RESOURCE_EXHAUSTED: No space left on device"), None),
    ],
)
def test_what_jax_raises_for_a_device_is_told_from_a_bug(raised, kind):
    error = errors.as_device_error(raised, "in training", "all is kept", "--batch_size")
    assert type(error) is (kind or type(None))
    if error:
        assert "in training" in str(error)
        assert "all is kept" in str(error)


def test_errors_pass_between_processes():
    for error in (errors.DataError("why"), errors.OutOfTimeError("why")):
        assert str(pickle.loads(pickle.dumps(error))) == "why"


@pytest.mark.parametrize(
    ("platforms", "raised", "words"),
    [
        ("cuda", AssertionError(), ["JAX_PLATFORMS=cuda: JAX finds no such device", 'pip install -U "jax[cuda13]"']),
        (
            "tpu,cpu",
            RuntimeError("no libtpu.so"),
            ["JAX_PLATFORMS=tpu,cpu: no libtpu.so; ", 'pip install -U "jax[tpu]"'],
        ),
        (
            "nonsense",
            RuntimeError("unknown (known: cpu)."),
            ["unknown (known: cpu); it must be of cpu, cuda, tpu, rocm"],
        ),
        ("", RuntimeError("CUDA_ERROR_NO_DEVICE"), ["CUDA_ERROR_NO_DEVICE; look at the device (nvidia-smi, dmesg)"]),
    ],
)
def test_a_platform_that_jax_cannot_start_on_is_a_wrong_setting(platforms, raised, words):
    error = errors.backend_error(raised, platforms)
    assert error.exit_code == 2
    for word in [*words, "or take the CPU with JAX_PLATFORMS=cpu"]:
        assert word in str(error)
    assert "\n" not in str(error)
