"""What the program that is being traced is for: its platform, and whether it is run or only counted."""

import contextlib
import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import jaxlib.version
from jax.sharding import Mesh

F = TypeVar("F", bound=Callable[..., Any])
_state = threading.local()
_pure: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()


def pure(function: F) -> F:
    """Marks a function whose result depends on its arguments alone: what is compiled of it may serve later calls."""
    _pure.add(function)
    return function


def is_pure(function: Callable[..., Any]) -> bool:
    """Whether a function is marked as `pure`."""
    return isinstance(function, types.FunctionType) and function in _pure


def platform() -> str:
    """Where the program that is being traced will run: "cpu", "gpu" or "tpu"."""
    if own := getattr(_state, "platform", None):
        return str(own)
    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # a Device, a platform's name, or None
    return getattr(device, "platform", device) or jax.default_backend()


@contextlib.contextmanager
def built_for(name: str) -> Iterator[None]:
    """Programs that are traced inside are for a platform that need not be here."""
    before = getattr(_state, "platform", None)
    _state.platform = name
    try:
        yield
    finally:
        _state.platform = before


@contextlib.contextmanager
def straight_line() -> Iterator[None]:
    """Programs that are traced and lowered inside have no loops of ours: XLA's counts take a loop's body once."""
    before = straight()
    _state.straight = True
    try:
        yield
    finally:
        _state.straight = before


def straight() -> bool:
    """Whether a program without loops is asked for."""
    return getattr(_state, "straight", False)


def jit(function: Callable[..., Any], *, mesh: Mesh | None = None, **settings: Any) -> Any:
    """`jax.jit` of a whole program, one that is not called by another: with compiler options for its platform.

    Args:
      function: what is compiled.
      mesh: the devices that it runs on, which need not be here; None for those that JAX takes.
      settings: as of `jax.jit`.
    """
    name = platform() if mesh is None else mesh.devices.flat[0].platform

    @functools.wraps(function)
    def on_mesh(*arguments: Any) -> Any:
        with built_for(name):
            return function(*arguments)

    options = _cpu_options() if name == "cpu" and not straight() else {}
    return jax.jit(function if mesh is None else on_mesh, compiler_options=options, **settings)


def once(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns that is called this once: its program is compiled in a quarter of the time, and runs slower.

    The bits are those of `jax.jit`. Inside of another program it is a part of that.
    """
    alone = not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
    options = {"xla_backend_optimization_level": "1"} if alone and platform() == "cpu" else {}
    return jax.jit(function, compiler_options=options)(*arguments)


@functools.cache
def _cpu_options() -> dict[str, str]:
    # XLA's CPU backend has YNNPACK for matrix products, sums and convolutions. Its convolutions are slower there than its
    # own Eigen kernels (`experiments.step_cost --peer=xla`). In jaxlib 0.10 its kernels of several operations in one
    # return wrong sums (docs/running.md), so it has single products only; a later jaxlib sums right.
    kinds = "INDIVIDUAL_DOT" if jaxlib.version.__version_info__ < (0, 11) else "DOT,LIBRARY_FUSION_TYPE_REDUCE"
    options = {"xla_cpu_experimental_ynn_fusion_type": f"LIBRARY_FUSION_TYPE_{kinds}"}
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:  # an XLA that knows no such option
        return {}
    return options
