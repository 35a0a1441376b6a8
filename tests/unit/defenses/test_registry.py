"""The registry: a defense is its loss, its settings, its label; what does not fit is refused when it is registered."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import defenses
from e2sad_jax.defenses import DEFENSES, Defense, Setting, readers, register
from e2sad_jax.errors import ConfigError
from tests.unit.defenses.toy import DELTA, EPS, KEY, VARIANTS, batch, close, draw, net


@pytest.mark.parametrize("name", DEFENSES)
def test_an_entry_is_whole(name):
    defense = DEFENSES[name]
    assert getattr(defenses, name) is defense.loss, "its function has the registered name"
    assert defense.label
    assert defense.loss.__doc__
    for setting in defense.settings:
        assert setting.help
        assert setting.check(setting.default) == setting.default
        if type(setting.default) in (int, float):
            assert setting.range
        assert name in readers(setting.name)


@pytest.mark.parametrize("name", DEFENSES)
def test_training_gives_a_loss_its_settings_and_what_its_signature_names(name):
    """Under the loss's own names; a step size of 0 as None; nothing that it does not take."""
    seen, defense = {}, DEFENSES[name]

    @functools.wraps(defense.loss)
    def loss(logits_fn, x, y, **arguments):
        seen.update(arguments)
        return jnp.zeros(()), {}

    spy = dataclasses.replace(defense, loss=loss)
    settings = {s.name: s.default for s in defense.settings}
    spy(
        net(draw()), *batch(), settings=settings, eps=EPS, bounds=(0, 1), key=KEY, delta=DELTA, taught=jnp.zeros((8, 3))
    )
    own = {s.argument or s.name for s in defense.settings if s.argument is not None}
    rest = {"eps", "eps1", "bounds", "key", "delta", "teacher_fn"} & set(seen)
    assert set(seen) == own | rest
    assert all(defense.takes(argument) for argument in seen)
    assert seen.get("step_size") is None
    assert seen.get("eps", EPS) == seen.get("eps1", EPS) == EPS
    assert defense.carries == (name in ("free", "uap")) == ("delta" in seen)
    for setting in defense.settings:
        if setting.argument is not None and not setting.zero_is_none:
            assert seen[setting.argument or setting.name] == setting.default


def test_called_by_training_a_defense_is_its_function():
    (x, y), f = batch(), net(draw())
    given = {"beta": 2.0, "attack_steps": 3, "attack_step_size": 0.05, "norm": "linf"}
    got = DEFENSES["trades"](f, x, y, settings=given, eps=EPS, bounds=(0.0, 1.0), key=KEY)
    close(got, VARIANTS["trades"](f, x, y, beta=2.0, steps=3, step_size=0.05))


def loss(logits_fn, x, y, *, eps=0.1, weight=1.0):
    return logits_fn(x).mean(), {}


def test_a_defense_of_ones_own_is_registered_once(monkeypatch):
    monkeypatch.setattr(defenses._registry, "DEFENSES", dict(DEFENSES))
    entry = Defense(loss, "mine", (Setting("pull", 1.0, "how hard", lower=0, argument="weight"),))
    register("mine", entry)
    assert defenses._registry.DEFENSES["mine"] is entry
    assert readers("pull") == ("mine",)
    with pytest.raises(ValueError, match="'mine' is registered already, as mine; choose another name"):
        register("mine", entry)
    with pytest.raises(ValueError, match="'e2sad' is registered already, as e2SAD"):
        register("e2sad", entry)
    with pytest.raises(ValueError, match="'a/b' needs a name of lower-case letters, digits and underscores"):
        register("a/b", entry)


@pytest.mark.parametrize("changes", [{"upper": 2.0}, {"default": 1}, {"budget": True}])
def test_one_flag_cannot_have_two_ranges(changes):
    alpha = {"default": 0.6, "lower": 0, "upper": 1, **changes}
    setting = Setting(name="alpha", help="another", argument="weight", **alpha)
    with pytest.raises(ValueError, match=r"mine: its setting 'alpha' has another type or range than fgsm's; choose"):
        register("mine", Defense(loss, "mine", (setting,)))
    assert "mine" not in DEFENSES


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"settings": (Setting("pull", 1.0, "how hard", lower=0),)}, "its loss takes no 'pull', for which --pull is"),
        ({"ascent": defenses.free_ascent}, "a loss that takes delta needs ascent=, and no other does"),
        ({"loss": defenses.free}, "a loss that takes delta needs ascent="),
        (
            {"loss": lambda f, x, y, *, needed: 0},
            "its loss needs 'needed', which is neither a setting nor one of eps, eps1",
        ),
        ({"replays": "times"}, "replays='times' must name one of its settings"),
    ],
)
def test_an_entry_that_does_not_fit_its_loss_is_refused(about, message):
    with pytest.raises(ValueError, match=f"mine: {message}"):
        Defense(**{"loss": loss, "label": "mine", **about})


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"default": 1.0, "lower": 0}, "at least 0"),
        ({"default": 1.0, "lower": 0, "upper": 2}, "in [0, 2]"),
        ({"default": 1.0, "above": 0}, "above 0"),
        ({"default": 1.0, "above": 0, "upper": 2}, "above 0, at most 2"),
        ({"default": "a", "choices": ("a", "b")}, "one of a, b"),
        ({"default": True}, ""),
    ],
)
def test_a_range_in_words(setting, words):
    assert Setting("x", help="", **setting).range == words


def test_a_checked_number_is_of_the_settings_type():
    for setting, value in (("beta", 3), ("beta", -0.0)):
        (one,) = [s for s in DEFENSES["trades"].settings if s.name == setting]
        got = one.check(value)
        assert (type(got), str(got)) == (float, str(abs(float(value))))
    with pytest.raises(ConfigError, match=r"--beta=True: must be of type float"):
        one.check(True)
    with pytest.raises(ConfigError, match=r"--beta=inf: must be at least 0"):
        one.check(np.inf.__float__())


def test_key_of_a_step_reaches_the_loss():
    (x, y), f = batch(), net(draw())
    own = {"settings": DEFENSES["n_fgsm"].defaults(), "eps": EPS, "bounds": (0.0, 1.0)}
    first, second = (DEFENSES["n_fgsm"](f, x, y, **own, key=jax.random.key(seed))[0] for seed in (1, 2))
    assert first != second
