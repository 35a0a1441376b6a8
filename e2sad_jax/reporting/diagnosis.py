"""A diagnosis as text, as Markdown and as a picture."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from e2sad_jax.reporting import plots, report

Result = Mapping[str, Any]


def _rows(result: Result) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables: title, head, cells."""
    eps, n = result["eps"], result["images"]
    curve = result["over_eps"]
    tables = [
        (
            f"Accuracy on {n:,} images against the budget (1 restart; clean {result['clean']:.3f})",
            ["eps", *(f"{e:.4g}" for e in curve["eps"])],
            [[name, *(f"{a:.3f}" for a in values)] for name, values in curve["accuracy"].items()],
        ),
        (
            f"Accuracy against PGD's steps (eps {eps:.4g}, 1 restart)",
            ["steps", *map(str, result["over_steps"]["steps"])],
            [["PGD", *(f"{a:.3f}" for a in result["over_steps"]["accuracy"])]],
        ),
        (
            f"Accuracy against restarts (eps {eps:.4g}, worst of them)",
            ["restarts", *(str(i + 1) for i in range(len(result["over_restarts"]["accuracy"])))],
            [
                [
                    result["over_restarts"]["attack"],
                    *(f"{a:.3f}" for a in result["over_restarts"]["accuracy"]),
                ]
            ],
        ),
    ]
    if worst := result["worst_case"]:
        words = [_describe(stage) for stage in worst["stages"]]
        tables.append(
            (
                f"Worst case (eps {eps:.4g}, {n:,} images): {'; '.join(words)}",
                ["after", *worst["accuracy"], "and all above"],
                [
                    [
                        "accuracy",
                        *(f"{a:.3f}" for a in worst["accuracy"].values()),
                        f"{worst['robust']:.3f}",
                    ],
                    ["fooled there", "", *map(str, worst["fooled"].values()), ""],
                ],
            )
        )
    if transfer := result["transfer"]:
        tables.append(
            (
                f"Transfer ({transfer['attack']}, eps {eps:.4g}, made for {transfer['from']})",
                ["accuracy of", result["name"], transfer["from"]],
                [["", f"{transfer['accuracy']:.3f}", f"{transfer['accuracy_of_substitute']:.3f}"]],
            )
        )
    tables.append(
        (
            "Checks for gradient masking",
            ["check", "found", "held to", ""],
            [
                [
                    c["name"],
                    f"{c['value']:.3f}",
                    f"{'at most' if c['below'] else 'at least'} {c['bound']}",
                    "SUSPICIOUS" if c["suspicious"] else "",
                ]
                for c in result["checks"]
            ],
        )
    )
    return tables


def _describe(stage: Mapping[str, Any]) -> str:
    if stage["kind"] == "square":
        return f"{stage['name']} {stage['steps']:,} queries"
    targets = f", {stage['targets']} targets" if stage["loss"] == "targeted_dlr" else ""
    return f"{stage['name']} {stage['steps']} steps{targets}, {stage['restarts']} restart"


def text(result: Result) -> str:
    """For a terminal."""
    parts = []
    for title, head, rows in _rows(result):
        parts.append("\n".join([title, *map(str.rstrip, report.aligned([head, *rows]))]))
    return "\n\n".join([*parts, result["verdict"]])


def markdown(result: Result) -> str:
    """For a file: the tables, the verdict, and where the numbers come from."""
    parts = [f"# {result['name']}: what its robustness is worth", result["verdict"]]
    for title, head, rows in _rows(result):
        lines = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
        parts.append("\n".join([f"{title}:", "", *lines]))
    about = result["environment"]
    parts.append("![Accuracy against budget and steps](evaluation.png)")
    parts.append(f"`{result['command']}`, {about['hardware']}, {about['date']}, commit {about['commit']}")
    return "\n\n".join(parts) + "\n"


def plot(path: pathlib.Path, results: Sequence[Result]) -> None:
    """Accuracy against budget and against steps, a colour for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles = ["--", "-", ":"]
    for i, result in enumerate(results):
        colour = f"C{i}"
        curve = result["over_eps"]
        for style, (name, values) in zip(styles, curve["accuracy"].items(), strict=False):
            label = f"{result['name']}, {name}" if len(results) > 1 else name
            left.plot([0, *curve["eps"]], [result["clean"], *values], style, color=colour, marker=".", label=label)
        if worst := result["worst_case"]:
            left.plot(result["eps"], worst["robust"], "*", color=colour, markersize=12, label="worst case")
        steps = result["over_steps"]
        right.plot(steps["steps"], steps["accuracy"], "-", color=colour, marker=".", label=result["name"])
    left.set(xlabel="eps (l-inf)", ylabel="accuracy", ylim=(0, 1.02))
    right.set(xlabel=f"PGD steps (eps {results[0]['eps']:.4g})", xscale="log", ylim=(0, 1.02))
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    figure.suptitle(f"Accuracy under attack, {results[0]['images']:,} images")
    plots.save(path, figure, dpi=120)
