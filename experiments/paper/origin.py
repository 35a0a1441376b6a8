"""Where the numbers of a table or figure come from."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from e2sad_jax.reporting import provenance
from e2sad_jax.runs.folder import read_training
from e2sad_jax.training.config import Config


def sentence(p: Mapping[str, Any]) -> str:
    """Where the numbers come from, in a few sentences: training, attacks, and the command that wrote them down."""
    parts = [f"{what} on {p[what.lower()]}." for what in ("Trained", "Attacked") if p.get(what.lower())]
    seeds = f" Seeds: {p['seeds']}." if p.get("seeds") else ""
    return (
        " ".join([*parts, ""])
        + f"Written {p['date']} by `{p['command']}` on {p['hardware']}; Python {p['python']}, JAX {p['jax']}, Flax "
        + f"{p['flax']}, optax {p['optax']}; commit {p['commit']}.{seeds}"
    )


def where(environments: Sequence[Mapping[str, Any]]) -> str:
    """Hardware, versions, commits and days of several processes, each said once."""

    def each(name: str, length: int | None = None) -> str:
        values = dict.fromkeys(str(e.get(name, "unknown"))[:length] for e in environments)
        return " and ".join(values)

    return f"{each('hardware')}, JAX {each('jax')}, commit {each('commit', 7)}, {each('date', 10)}"


def about(
    configs: Sequence[Config] = (), attacked: Sequence[Mapping[str, Any]] = (), seeds: Sequence[int] = ()
) -> dict[str, Any]:
    """Provenance of what is written now.

    Args:
      configs: the runs that it shows.
      attacked: provenance of the outcomes that it shows.
      seeds: of the runs.
    """
    segments = [segment for config in configs for segment in read_training(pathlib.Path(config.workdir))]
    return {
        "command": provenance.command(),
        **provenance.environment(),
        "trained": where(segments) if segments else "",
        "attacked": where(attacked) if attacked else "",
        "seeds": ", ".join(map(str, seeds)),
    }
