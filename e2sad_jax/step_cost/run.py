"""From a request to the table and the files."""

import pathlib
from typing import Any

from e2sad_jax.errors import ConfigError, Error
from e2sad_jax.step_cost import show
from e2sad_jax.step_cost.measure import measure
from e2sad_jax.step_cost.request import OURS, Request
from e2sad_jax.workdir import write_json, write_text


class StepsFailedError(Error):
    """Steps could not be measured; their rows say why, the others were written."""


def run(request: Request) -> None:
    """Measures, prints the table, and writes step_cost.json, .md and .png.

    Raises:
      ConfigError: if the folder cannot be written, found before anything is measured.
      StepsFailedError: if a step of ours failed, after the others were written.
    """
    folder = pathlib.Path(request.results).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--results={request.results}: cannot be written ({error.strerror}); choose another folder"
        ) from error

    def write(result: dict[str, Any]) -> None:
        print(show.text(result))
        write_json(folder / "step_cost.json", result)
        write_text(folder / "step_cost.md", show.markdown(result))
        show.plot(folder / "step_cost.png", result)
        for name in ("step_cost.md", "step_cost.json", "step_cost.png"):
            print(folder / name)

    result = measure(request, write)
    failed = [row["name"] for row in result["rows"] if row["error"] and row["by"] == OURS]
    if failed:
        raise StepsFailedError(
            f"{len(failed)} steps could not be measured: {', '.join(failed)} (see their rows); a smaller --batch_size "
            "takes less memory"
        )
