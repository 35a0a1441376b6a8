"""From a request to the table and the files."""

import pathlib
from typing import Any

from e2sad_jax._io import check_folder, write_json, write_text
from e2sad_jax.runs.signals import stopping
from experiments.step_cost import ahead, show
from experiments.step_cost.measure import measure
from experiments.step_cost.request import OURS, Request, StepsFailedError


def run(request: Request) -> None:
    """Measures, or compiles for targets (`ahead.run`).

    Writes step_cost.json and .md after each round, and at the end step_cost.png; prints the table.

    Raises:
      ConfigError: if the folder cannot be written, found before anything is measured.
      StepsFailedError: if a step of ours failed, or a peer's is not ours, after the others were written.
      Stopped: after Ctrl-C or SIGTERM, once what was measured is written.
    """
    if request.target:
        ahead.run(request)
        return
    folder = pathlib.Path(request.results).expanduser()
    check_folder(folder, f"--results={request.results}", make=True)
    latest: dict[str, Any] = {}

    def write(result: dict[str, Any]) -> None:
        latest.update(result)
        write_json(folder / "step_cost.json", result)
        write_text(folder / "step_cost.md", show.markdown(result))

    with stopping(at_once=True):
        try:
            measure(request, write)
        finally:  # interrupted or not
            if latest:
                print(show.text(latest))
                show.plot(folder / "step_cost.png", latest)
                for name in ("step_cost.md", "step_cost.json", "step_cost.png"):
                    print(folder / name)
    failed = [row["name"] for row in latest["rows"] if row["error"] and row["by"] == OURS]
    differ = [f"{row['name']} by {row['by']}" for row in latest["rows"] if row["differs"]]
    said = []
    if failed:
        said.append(
            f"{len(failed)} steps could not be measured: {', '.join(failed)} (see their rows); a smaller --batch_size "
            "takes less memory"
        )
    if differ:
        said.append(
            f"{len(differ)} steps of others do something else than ours: {', '.join(differ)} (see their rows); the rest "
            "of the table is valid"
        )
    if said:
        raise StepsFailedError("; ".join(said))
