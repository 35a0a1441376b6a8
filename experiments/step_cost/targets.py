"""Accelerators that steps are compiled for without one, and what bounds a step on them."""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from e2sad_jax.errors import ConfigError, first_line


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do at most.

    Attributes:
      name: as `--target` has it.
      platform: JAX's name of its plugin, "tpu" or "cuda".
      package: what has to be installed, by the name that Python imports.
      peak: FLOPs per second by precision, a key of `networks.PRECISIONS`.
      bandwidth: bytes per second between the chip and its memory.
      memory: bytes.
      link: bytes per second that it sends to its neighbours.
      host: chips whose links are that fast; beyond, each sends `far` bytes per second.
      far: bytes per second between hosts.
      source: where the numbers are from.
    """

    name: str
    platform: str
    package: str
    peak: Mapping[str, float]
    bandwidth: float
    memory: float
    link: float
    host: int
    far: float
    source: str


def _tpu(name: str, bf16: float, bandwidth: float, memory: float, link: float) -> Chip:
    # Float32 products take six passes in bfloat16, those of "tf32" (Precision.HIGH) three.
    peak = {"float32": bf16 / 6, "tf32": bf16 / 3, "bf16": bf16}
    source = f"https://cloud.google.com/tpu/docs/{name}"
    return Chip(name, "tpu", "libtpu", peak, bandwidth, memory, link, 256, link, source)


CHIPS: Mapping[str, Chip] = {
    "v5e": _tpu("v5e", 197e12, 819e9, 16e9, 200e9),
    "v6e": _tpu("v6e", 918e12, 1638e9, 32e9, 400e9),
    "h100": Chip(
        name="h100",
        platform="cuda",
        package="jax_plugins.xla_cuda12",
        peak={"float32": 66.9e12, "tf32": 494.7e12, "bf16": 989.4e12},
        bandwidth=3.35e12,
        memory=80e9,
        link=450e9,
        host=8,
        far=50e9,
        source="https://www.nvidia.com/en-us/data-center/h100/",
    ),
}
# XLA's description of the GPU, which it otherwise asks the driver for.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_NAMES = "v5e, v5e:2x2, v5e:16x16, v6e:2x2, h100, h100x8"


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips of one kind.

    Attributes:
      name: as `--target` has it.
      chip: their kind.
      count: how many.
    """

    name: str
    chip: Chip
    count: int

    @classmethod
    def named(cls, name: str) -> "Target":
        """The target of a name: a chip; of TPUs a torus as v5e:4x4; of GPUs a number as h100x8.

        Raises:
          ConfigError: if there is none of that name, or the package is missing that compiles for it.
        """
        found = re.fullmatch(r"(v5e|v6e)(?::([1-9]\d?)x([1-9]\d?))?|(h100)(?:x([1-9]\d{0,3}))?", name)
        if found is None:
            raise ConfigError(f"--target={name:.100}: must be of {_NAMES} and the like; several with commas")
        tpu, rows, columns, gpu, number = found.groups()
        chip, count = CHIPS[tpu or gpu], int(number or int(rows or 1) * int(columns or 1))
        if count > chip.host and count % chip.host:
            raise ConfigError(f"--target={name}: must be at most {chip.host} chips or whole hosts of {chip.host}")
        if not importable(chip.package):
            raise ConfigError(
                f"--target={name}: needs {chip.package}, not installed here: pip install -e '.[aot]', in an environment "
                "of its own"
            )
        return cls(name, chip, count)

    def devices(self) -> Sequence[jax.Device]:
        """Its chips, which nothing can be run on.

        Raises:
          ConfigError: if the plugin has no such chips.
        """
        from jax.experimental import topologies

        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # that there is no driver
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nobody to ask which TPU this is
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it holds no chip
        if self.chip.platform == "tpu":
            grid = self.name.partition(":")[2]
            given: dict[str, Any] = {"topology_name": f"{self.chip.name}:{grid if self.count >= 4 else '2x2'}"}
        else:
            hosts, each = max(1, self.count // self.chip.host), min(self.count, self.chip.host)
            given = {"topology_name": "", "target_config": _H100, "topology": f"1x{hosts}x{each}"}
        try:
            return list(topologies.get_topology_desc(platform=self.chip.platform, **given).devices)[: self.count]
        except Exception as error:  # whatever the plugin raises
            raise ConfigError(f"--target={self.name}: {self.chip.package} has none: {first_line(error)}") from error

    def bound(self, flops: float, moved: float, reduced: float, precision: str) -> dict[str, float]:
        """The seconds that a step takes at least, if each part were done at the chip's peak.

        Args:
          flops: of a chip.
          moved: bytes between a chip and its memory.
          reduced: bytes that are summed over the chips. A sum sends 2 (n - 1) / n times its bytes from each of n chips.
          precision: of the products.

        Returns:
          "compute", "memory" and "links".
        """
        chip, n = self.chip, self.count
        sent = 2 * (n - 1) / n * reduced
        return {
            "compute": flops / chip.peak[precision],
            "memory": moved / chip.bandwidth,
            "links": sent / (chip.link if n <= chip.host else chip.far),
        }


def importable(package: str) -> bool:
    """Whether a package, which may be inside of another, is installed."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@contextlib.contextmanager
def less_optimising() -> Iterator[None]:
    """A TPU's programs are compiled in a quarter of the time; FLOPs and collectives are the same."""
    before = jax.config.jax_exec_time_optimization_effort  # type: ignore[attr-defined]
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    try:
        yield
    finally:
        jax.config.update("jax_exec_time_optimization_effort", before)
