"""Model cards: what a model is for, how it was trained and evaluated, and what the numbers do not say.

python -m e2sad_jax.reporting.card results.json    # prints the card of a run
"""

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from e2sad_jax.data.dataset import in_words
from e2sad_jax.defenses import DEFENSES
from e2sad_jax.evaluation import nan_logits
from e2sad_jax.reporting import provenance
from e2sad_jax.reporting.table import Table
from e2sad_jax.training.config import Config

WORST = "all attacks combined"
PURPOSE = (
    "- **For:** research on defenses against adversarial images. Not for decisions that matter, and "
    "no protection by itself."
)


def limits(seeds: int, *images: int) -> list[str]:
    """The lines of a model card's section on limits.

    Args:
      seeds: how many each model was trained with, at most.
      *images: numbers of images that the accuracies are measured on.

    Returns:
      Items of a list in Markdown.
    """
    errors = (f"on {n:,} images is up to {0.5 / n**0.5:.3f}" for n in images)
    return [
        f"- {'One seed' if seeds == 1 else f'At most {seeds} seeds'}. The standard error of an accuracy {', '.join(errors)}.",
        "- A robust accuracy is an upper bound for these attacks, budgets and steps. Another norm, a larger budget or a "
        "better attack gives less. IFGSM never turns back and is weak; `experiments.evaluate` attacks harder.",
    ]


def images_of(results: Mapping[str, Any]) -> str:
    """The test images of an evaluation in words."""
    there = results["dataset"]
    return in_words(results["examples"], there["test_examples"], results.get("classes"), there["num_classes"])


def values(measured: Mapping[str, Any]) -> list[float]:
    """Accuracies of one checkpoint under each attack, then under all combined."""
    return [*(row["accuracy"] for row in measured["attacks"]), measured["worst_case_accuracy"]]


def accuracies(measured: Mapping[str, Any]) -> list[str]:
    """`values` as shown."""
    return [f"{value:.4f}" for value in values(measured)]


def apart(results: Mapping[str, Any]) -> bool:
    """Whether the best weights exist and differ from the last ones."""
    best = results.get("best")
    return best is not None and (best["step"] != results["steps"] or best.get("averaged", False))


def which(best: Mapping[str, Any]) -> str:
    """The step of a best checkpoint, and whether its averaged weights are meant."""
    return f"step {best['step']:,}" + (", averaged weights" if best.get("averaged") else "")


def model_card(results: Mapping[str, Any]) -> str:
    """model_card.md of one run: purpose, data, training, accuracies with each attack's effort, limits.

    Args:
      results: what results.json holds.
    """
    config, data, n = results["config"], results["dataset"], results["examples"]
    shape = "x".join(map(str, data["image_shape"]))
    columns = {"accuracy": accuracies(results)}
    if apart(results):
        best = results["best"]
        columns[f"best checkpoint, {which(best)}"] = accuracies(best)
    efforts = [*map(_effort, results["attacks"]), [WORST, "", "", "", ""]]
    table = Table(
        columns=["attack", "budget", "steps", "step size", "restarts", *columns],
        rows=[[*effort, *shown] for effort, *shown in zip(efforts, *columns.values(), strict=True)],
    )
    lines = [
        f"# Model card: {config['defense']} on {data['name']}",
        "",
        f"- **Model:** `{config['model']}`, {results['parameters']:,} parameters, images {shape}, {data['num_classes']} "
        f"classes, input `{config['transform']}`, layers in {config['precision']}.",
        PURPOSE,
        f"- **Data:** {' '.join(filter(None, (data['name'], data['version'])))}, {data['train_examples']:,} training images "
        f"(SHA-256 of the content `{data['sha256'][:16]}...`). The model inherits what they leave out or get wrong.",
        f"- **Training:** {results['steps']:,} steps of {config['batch_size']}, `{' '.join(_flags(config))}`, other settings "
        f"at their defaults; {results['train_seconds']:,} seconds.",
        f"- **Command:** `{results['command']}`",
        f"- **Provenance:** {provenance.sentence(results['environment'])}",
        "",
        "## Evaluation",
        "",
        f"On {images_of(results)}, with their true labels. The attacks maximise the cross-entropy inside l-infinity balls; "
        "budgets are in units of the network's input.",
        "",
        table.markdown(),
        "## Limits",
        "",
        *limits(1, n),
    ]
    if nan := nan_logits({row["name"]: row.get("nan", 0) for row in results["attacks"]}, n):
        lines.append(f"- {nan}.")
    if broken := DEFENSES[config["defense"]].broken if config["defense"] in DEFENSES else "":
        lines.append(
            f"- This defense is broken ({broken}): accuracy under attacks that follow the gradient of its loss says nothing. "
            "Measure it by `experiments.evaluate`."
        )
    if results["worst_case_accuracy"] < 0.5:
        lines.append(
            "- All attacks combined fool the model on more than half of the images: not robust at these budgets."
        )
    return "\n".join(lines) + "\n"


def _effort(row: Mapping[str, Any]) -> list[str]:
    """An attack's cells in a model card: name, budget, steps, step size, restarts."""
    if row["kind"] == "clean":
        return ["clean", "", "", "", ""]
    step = row["step_size"] or (row["eps"] / row["steps"] if row["kind"] in ("fgsm", "ifgsm", "mi_fgsm") else None)
    return [
        str(row["name"]),
        f"{row['eps']:.4g}",
        str(row["steps"]),
        "" if step is None else f"{step:.2g}",
        str(row["restarts"]),
    ]


def _flags(config: Mapping[str, Any]) -> list[str]:
    """The settings of a run as flags: the defense, and what differs from its paper's setting."""
    values = Config(defense=config["defense"]).to_json()  # older cards have settings that the defense does not read
    own = Config.from_json({k: v for k, v in config.items() if k in values}).in_effect()
    changed = {k: v for k, v in own.items() if k not in ("defense", "steps", "epochs") and v != values[k]}
    flags = [f"--no{k}" if v is False else f"--{k}" if v is True else f"--{k}={v}" for k, v in changed.items()]
    return [f"--defense={config['defense']}", "--preset=paper", *flags]


if __name__ == "__main__":
    print(model_card(json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
