"""One run on several devices and several hosts: its processes, the mesh, and what lies where on it.

Parameters, optimizer state and data set are replicated on each device; the batch is split over the mesh's one axis,
"data". The program is that of one device, jitted; XLA splits it and sums the gradients. So the batch, its order and all
random numbers are those of one device.
"""

import functools
import itertools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from e2sad_jax.errors import ConfigError, backend_error, first_line

AXIS = "data"
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as lost
PATIENCE = 24 * 3600  # seconds that `barrier` waits: the first process evaluates meanwhile
_barriers = itertools.count()


def connect(coordinator: str = "", process_id: int = -1, num_processes: int = 0) -> None:
    """Makes this process one of several that train together; does nothing if no argument is given.

    Call it before anything is computed, in each process with the same settings.

    Args:
      coordinator: HOST:PORT of process 0, which all must reach; "auto" to let JAX find all three on a cluster (Slurm,
        MPI, Kubernetes) or a TPU pod.
      process_id: number of this process, from 0.
      num_processes: number of processes.

    Raises:
      ConfigError: if the three do not fit together or the other processes cannot be reached.
    """
    if not coordinator:
        if process_id >= 0 or num_processes > 0:
            raise ConfigError(
                "--coordinator=: must be HOST:PORT of process 0 if --process_id or --num_processes is given"
            )
        return
    arguments: dict[str, Any] = {}
    if coordinator != "auto":
        if ":" not in coordinator:
            raise ConfigError(f"--coordinator={coordinator}: must be HOST:PORT of process 0, or auto")
        if num_processes < 1:
            raise ConfigError(f"--num_processes={num_processes}: must be at least 1")
        if not 0 <= process_id < num_processes:
            raise ConfigError(f"--process_id={process_id}: must be in [0, {num_processes - 1}], below --num_processes")
        arguments = {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
        }
    jax.config.update("jax_enable_preemption_service", False)  # its handler would keep SIGTERM from ours
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--coordinator={coordinator}: cannot join the other processes: {first_line(error)}; start all of them, with one "
            "address that all can reach"
        ) from error


def require_backend() -> None:
    """Starts JAX on the platform that JAX_PLATFORMS names. Commands call it before they load anything.

    Raises:
      ConfigError: if there is no such platform or device, or JAX is not installed for it.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise backend_error(error, jax.config.jax_platforms or "") from error  # type: ignore[attr-defined]


def is_multiprocess() -> bool:
    """Returns whether the run has other processes."""
    return jax.process_count() > 1


def is_main() -> bool:
    """Returns whether this is the process that writes files and reports."""
    return jax.process_index() == 0


def check_divides(devices: int, batch_size: int) -> None:
    """Refuses a batch that cannot be split evenly.

    Raises:
      ConfigError: if the devices do not divide it.
    """
    if batch_size % devices:
        below, above = batch_size // devices * devices, -(-batch_size // devices) * devices
        sizes = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"--batch_size={batch_size}: must be a multiple of the {devices} devices; the next are {sizes}"
        )


def mesh(devices: int, batch_size: int, among: Sequence[jax.Device] | None = None) -> Mesh | None:
    """Returns the mesh of a run.

    Args:
      devices: number of devices; 0 for all. Several processes must use all.
      batch_size: images a step, over all devices.
      among: the devices to take from; None for all that JAX sees. They need not be here, as those of
        `jax.experimental.topologies`: a program for their mesh is compiled ahead of time.

    Returns:
      The mesh; None for one device that JAX sees, where nothing needs to be placed.

    Raises:
      ConfigError: if there are fewer devices, or they do not divide the batch, or JAX cannot start.
    """
    if among is None:
        require_backend()
    there = jax.devices() if among is None else among
    if devices > len(there):
        kind = there[0].platform
        seen = "JAX sees" if among is None else "there are"
        more = "; on the CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N makes N" if kind == "cpu" else ""
        raise ConfigError(f"--devices={devices}: must be at most {len(there)}, the {kind} devices that {seen}{more}")
    if is_multiprocess() and devices not in (0, len(there)):
        raise ConfigError(
            f"--devices={devices}: must be 0 or {len(there)}, all devices of the {jax.process_count()} processes"
        )
    n = devices or len(there)
    check_divides(n, batch_size)
    return Mesh(np.asarray(there[:n]), (AXIS,), axis_types=(AxisType.Auto,)) if n > 1 or among is not None else None


def whole(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that replicates an array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the sharding that splits an axis of an array over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))


def replicate(mesh: Mesh | None, tree: Any) -> Any:
    """Puts arrays on every device of the mesh; on the default device without a mesh.

    Args:
      mesh: the devices.
      tree: arrays, the same in each process; keys of random numbers may be among them.
    """
    if mesh is None:
        return jax.device_put(tree)
    return jax.tree.map(functools.partial(_everywhere, whole(mesh)), tree)


def _everywhere(place: NamedSharding, array: Any) -> jax.Array:
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        impl = jax.random.key_impl(array)
        return jax.random.wrap_key_data(_everywhere(place, jax.random.key_data(array)), impl=impl)
    if place.is_fully_addressable:
        return jax.device_put(array, place)
    with jax.transfer_guard("allow"):
        value = np.asarray(array)
        return jax.make_array_from_callback(value.shape, place, lambda index: value[index])


def split_batch(mesh: Mesh | None, batch: Any) -> Any:
    """Splits the arrays of a batch over the mesh; replicates them if the devices do not divide their length.

    Without a mesh it puts them on the default device. It says so in so many words, for `jax.transfer_guard` may forbid
    what is not said.
    """
    if mesh is None:
        return jax.device_put(batch)
    fits = len(jax.tree.leaves(batch)[0]) % mesh.size == 0
    return jax.device_put(batch, split(mesh) if fits else whole(mesh))


def local(tree: Any) -> Any:
    """Returns the copy of replicated arrays on the first device of this process."""
    return jax.tree.map(_first_copy, tree)


def _first_copy(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_first_copy(jax.random.key_data(array)), impl=jax.random.key_impl(array))
    return array.addressable_data(0)


def check_same(what: str) -> None:
    """Compares a text between all processes, such as their settings; waits for all.

    Raises:
      ConfigError: if one of them has another text.
    """
    if is_multiprocess():
        with jax.transfer_guard("allow"):
            digests = multihost_utils.process_allgather(np.uint32(zlib.crc32(what.encode())))
        others = [i for i, digest in enumerate(digests.tolist()) if digest != digests[0]]
        if others:
            raise ConfigError(
                f"--process_id={', '.join(map(str, others))}: other settings or other data than --process_id=0; start all "
                "processes with the same flags and the same files"
            )


def barrier() -> None:
    """Waits until all processes have called it, for `PATIENCE` seconds at most."""
    if is_multiprocess():
        # JAX's own public barrier, `sync_global_devices`, runs on the devices and has no time limit to choose.
        from orbax.checkpoint.multihost import get_barrier_sync_fn

        get_barrier_sync_fn()(key=f"e2sad_jax_{next(_barriers)}", timeout_ms=1000 * PATIENCE)


def max_over_processes(number: int) -> int:
    """Returns the largest of all processes' numbers, so that all act on what one of them knows; waits for all."""
    if not is_multiprocess():
        return number
    with jax.transfer_guard("allow"):
        return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def broadcast_from_main(values: dict[str, float]) -> dict[str, float]:
    """Returns the values that the first process has, in all processes; waits for it."""
    if not is_multiprocess():
        return values
    with jax.transfer_guard("allow"):
        received = multihost_utils.broadcast_one_to_all(np.asarray(list(values.values()), np.float32))
    return dict(zip(values, np.asarray(received).tolist(), strict=True))
