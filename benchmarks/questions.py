"""What the committed results answer: a question for each folder, and how its answer is read from the folder's file."""

import dataclasses
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.official_page import by_seed, default

PEERS = {"torch": "eager PyTorch's", "xla": "XLA's own convolutions'"}  # the first one that was measured is named
Content = Any  # of a JSON file, or the text of a Markdown file


@dataclasses.dataclass(frozen=True)
class Question:
    """One row of the table.

    Attributes:
      text: the question.
      page: what the row links to, below results/.
      source: file that holds the answer and its provenance.
      answer: from the content of `source` to a short text with a number.
      command: what makes the folder, where it is not there yet; else the source has it.
    """

    text: str
    page: str
    source: str
    answer: Callable[[Content], str]
    command: str = ""


def _robust(*names: str) -> Callable[[Content], str]:
    """Robust accuracies of entries of a comparison, and the price of a step after the first."""

    def answer(result: Content) -> str:
        rows = {row["name"]: row for row in result["rows"]}
        shown = []
        for name in names:
            price = rows[name]["step_flops"] / result["natural_step_flops"]
            note = f"{rows[name]['last']['steps'][0]:,} steps" if result["request"]["equal_flops"] else f"{price:.2f}"
            shown.append(f"{name} {rows[name]['last']['robust']:.3f} ({note})")
        return "; ".join(shown)

    return answer


def _seeds(result: Content) -> str:
    own = result["rows"][0]["last"]
    spread = f" ({own['lowest']:.3f} to {own['highest']:.3f})" if own["lowest"] < own["highest"] else ""
    return f"{own['robust']:.3f}{spread}, clean {own['clean']:.3f}"


def _lengths(result: Content) -> str:
    shown = [
        f"{row['preset']} {row['robust']:.3f} ({row['steps']:,} steps), under IFGSM-30 {row['ifgsm']:.3f}"
        for row in result["rows"]
    ]
    return "; ".join(shown)


def _official(result: Content) -> str:
    last = result["rows"][-1]
    differ = len(result["differ"])
    return f"official {last['official']:.3f}, ours {last['ours']:.3f}, {differ} of {result['examples']:,} images differ"


def _agreement(result: Content) -> str:
    """How far the default of `auto` is from the official worst case over all networks and balls, and with `near`."""
    groups = by_seed(result["results"])
    seeds = {len(group) for group in groups}
    several = f", {seeds.pop()} seeds each" if len(seeds) == 1 and seeds != {1} else ""
    text = f"{len(groups)} networks and balls{several}: ours {_span(groups, 'ours', 'the official worst case')}"
    if near := [group for group in groups if "near" in group[0]]:
        text += f"; near {near[0][0]['near']:g}, of {len(near)}: {_span(near, 'near', 'it')}"
    return text


def _span(groups: Sequence[Sequence[Content]], side: str, official: str) -> str:
    """The least and the largest difference in points from the official side, and the share of its gradients."""
    above, gradients = [], {"official": 0, side: 0}
    for group in groups:
        # "judged" is what many draws say of a random network.
        left = [one.get("judged", default(one)[-1])[side] for one in group]
        of_official = [one.get("judged", one["rows"][-1])["official"] for one in group]
        above.append(100 * (statistics.fmean(left) - statistics.fmean(of_official)))
        for one in group:
            gradients["official"] += sum(row["official_gradients"] for row in one["rows"][1:])
            gradients[side] += sum(row[f"{side}_gradients"] for row in default(one))
    share = f", with {gradients[side] / gradients['official']:.2f} of its gradients" if gradients["official"] else ""
    low, high = min(above), max(above)
    return f"{f'{low:+.1f} to {high:+.1f}' if low < high else f'{low:+.1f}'} points from {official}{share}"


def _startup(result: Content) -> str:
    shown = [
        f"{name} {run['first']['first step']:.0f} s to the first step, {run['whole']:.0f} s to the end"
        for name, run in result["runs"].items()
    ]
    return "; ".join(shown)


def _throughput(result: Content) -> str:
    rates = result["images_per_second"]
    shown = [f"{name} {rate:,.0f}" for name, rate in rates.items()]
    return f"images a second: {', '.join(shown)}"


def _optimality(result: Content) -> str:
    """The best attack of each norm, by its mean over the networks."""
    shown = []
    for norm in dict.fromkeys(one["norm"] for one in result["results"]):
        of: dict[str, list[float]] = {}
        for one in result["results"]:
            for row in one["rows"] if one["norm"] == norm else ():
                of.setdefault(f"{row['attack']} of {row['side']}", []).append(100 * row["optimality"])
        means = {name: sum(values) / len(values) for name, values in of.items()}
        best = sorted(means, key=lambda name: -means[name])[:2]
        shown.append(f"{norm}: " + ", ".join(f"{name} {means[name]:.1f}" for name in best))
    return "; ".join(shown)


def _worth(without: str, what: str = "it") -> Callable[[Content], str]:
    """Robust accuracy of e2SAD's robust preset, and of the entry that lacks one of its parts."""

    def answer(result: Content) -> str:
        rows = {row["name"]: row["last"]["robust"] for row in result["rows"]}
        return f"{rows['e2SAD, robust']:.3f} with {what}, {rows[f'e2SAD, robust, {without}']:.3f} without"

    return answer


def _worst(result: Content) -> str:
    return f"{result['config']['defense']} {result['worst_case_accuracy']:.3f} on {result['examples']:,} images"


def _table_1(result: Content) -> str:
    found = {
        (r["model"], r["name"]): r
        for r in result["records"]
        if r["label"] == "soft" and r["name"].startswith("IFGSM-30")
    }
    ours, paper = (found["e2SAD", "IFGSM-30"][key] for key in ("ours", "paper"))
    return f"e2SAD under IFGSM-30: {ours:.3f} (paper {paper:.3f})"


def _step(result: Content) -> str:
    rows = {(row["name"], row["by"]): row for row in result["rows"]}
    peer, name = next((by, name) for by, name in PEERS.items() if ("e2sad", by) in rows)
    ratio = rows["e2sad", peer]["ours_over_peer"]
    return f"e2SAD {rows['e2sad', 'e2sad_jax']['time_natural']:.2f} natural steps, {ratio:.2f} of {name} time"


def _bounds(result: Content) -> str:
    """The bound of e2SAD's robust step on one chip, by precision."""
    bounds = {
        row["precision"]: f"{1e3 * max(row['bounds'].values()):.2f} ms in {row['precision']}"
        for row in result["rows"]
        if (row["label"], row["chips"]) == ("e2sad, robust", 1)
    }
    return f"e2SAD, robust, on one chip: at least {', '.join(bounds.values())}"


def _bounds_and_sums(result: Content) -> str:
    """The bound of e2SAD's robust step, and how often the chips exchange something in it."""
    (row,) = (row for row in result["rows"] if row["label"] == "e2sad, robust")
    sums = row["collectives"]["all-reduce"]["number"]
    return f"e2SAD, robust: at least {1e3 * max(row['bounds'].values()):.2f} ms, {sums} sums"


def _cited(result: Content) -> str:
    rows = result["rows"]
    names = ("distillation", "feature squeezing", "MagNet", "Defense-GAN", "e2SAD, robust")
    shown = [
        (name, rows[name]["claimed"]["robust"], rows[name]["adaptive"]["robust"]) for name in names if name in rows
    ]
    return "; ".join(f"{name} {claimed:.3f}, adaptive {adaptive:.3f}" for name, claimed, adaptive in shown)


def _flops(text: Content) -> str:
    """By `benchmarks.flops`: name, GFLOP, natural steps."""
    rows = dict(re.findall(r"^\| ([^|]+) \| [\d.]+ \| ([\d.]+) \|$", text, re.M))
    return f"e2SAD {float(rows['e2sad']):.2f}, IFGSM-30 {float(rows['ifgsm, attack_steps 30']):.2f} natural steps"


def _peers(text: Content) -> str:
    """By `benchmarks.attack_peers`: an attack's accuracy by us and by ART, lower being stronger."""
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| [\d.]", text, re.M)
    weaker = [float(ours) - float(theirs) for _, ours, theirs in rows if float(ours) > float(theirs)]
    shown = f"at least as strong in {len(rows) - len(weaker)} of {len(rows)} attacks"
    return f"{shown}, weaker by {max(weaker):.3f} in the other" if weaker else shown


def _faults(result: Content) -> str:
    kinds = result.values()
    count = sum(row["times"] for kind in kinds for row in kind["rows"])
    return f"{sum(kind['wrong'] for kind in kinds)} of {count:,} outcomes wrong"


MNIST = "python -m experiments.compare --data=mnist"
SMALL = f"{MNIST} --steps=2000 --batch_size=64 --examples=500 --queries=300 --apgd_steps=30 --targets=3"
ROBUST2 = "e2SAD, robust2"
ROBUST = f'{MNIST} --entry="e2SAD, robust"'
QUESTIONS = (
    Question(
        "How robust is each defense on MNIST, and at what price? (FLOPs of a step, natural = 1)",
        *("defenses_mnist/compare.md", "defenses_mnist/compare.json"),
        _robust("e2SAD, robust", "PGD-3", "PGD-10", "IFGSM-30 (Eq. 3)"),
    ),
    Question(
        "And for the same training FLOPs, with memory and soft labels?",
        *("mnist_short/compare.md", "mnist_short/compare.json"),
        _robust(ROBUST2, "e2SAD, robust", "ATTA-1", "PGD-3", "RS-FGSM"),
    ),
    Question(
        "And on the digits, a small data set?",
        *("digits_flops/compare.md", "digits_flops/compare.json"),
        _robust("e2SAD, robust", ROBUST2, "ATTA-1", "FGSM-PGI", "PGD-3"),
    ),
    Question(
        "And on a part of SVHN, at 8/255?",
        *("svhn_flops/compare.md", "svhn_flops/compare.json"),
        _robust("e2SAD, robust", ROBUST2, "FGSM-PGI", "ATTA-2", "PGD-3"),
    ),
    Question(
        "And there with PreActResNet-18 of width 8, for the same number of steps?",
        *("svhn_resnet/none/compare.md", "svhn_resnet/none/compare.json"),
        _robust("natural", "RS-FGSM", ROBUST2),
    ),
    Question(
        "And with crops and flips?",
        *("svhn_resnet/crop_flip/compare.md", "svhn_resnet/crop_flip/compare.json"),
        _robust("natural", ROBUST2),
    ),
    *(
        Question(
            question,
            *(f"svhn_resnet/fine_tuned/{folder}/compare.md", f"svhn_resnet/fine_tuned/{folder}/compare.json"),
            _robust("natural", "RS-FGSM", ROBUST2),
        )
        for question, folder in (
            ("And from a natural network's weights?", "none"),
            ("And with crops?", "crop"),
            ("And with crops and flips from these weights?", "crop_flip"),
        )
    ),
    Question(
        "And for four times as many FLOPs, on all test images?",
        *("mnist_long/compare.md", "mnist_long/compare.json"),
        _robust("e2SAD, robust", ROBUST2, "FGSM-PGI", "ATTA-2", "PGD-3"),
    ),
    Question(
        "And these under the effort of AutoAttack, Square among the attacks, on 500 images?",
        *("mnist_long/standard/compare.md", "mnist_long/standard/compare.json"),
        _robust("e2SAD, robust", ROBUST2, "FGSM-PGI", "ATTA-2", "PGD-3"),
    ),
    Question(
        "And does it pay to train for 30 epochs?",
        *("mnist_30_epochs/compare.md", "mnist_30_epochs/compare.json"),
        _robust(ROBUST2),
    ),
    Question(
        "And at the full width of the paper's network, 1,000 test images, Square (200 queries) among the attacks?",
        *("mnist_lengths/lengths.md", "mnist_lengths/lengths.json"),
        _lengths,
        "python -m benchmarks.lengths --results=results/mnist_lengths",
    ),
    Question(
        "And what does the official AutoAttack code say of e2SAD there?",
        *("mnist_long/official/official.md", "mnist_long/official/official.json"),
        _official,
    ),
    Question(
        "What do the defenses that the paper cites withstand? (digits; the claimed attack, then an adaptive one)",
        *("cited_digits/cited.md", "cited_digits/cited.json"),
        _cited,
        "python -m experiments.compare --cited --data=digits --eps=0.2 --steps=1000 --batch_size=32 --apgd_steps=30 "
        "--targets=3 --queries=300 --results=results/cited_digits",
    ),
    Question(
        "And on MNIST, after 500 steps?",
        *("cited_mnist/cited.md", "cited_mnist/cited.json"),
        _cited,
        "python -m experiments.compare --cited --data=mnist --eps=0.3 --steps=500 --batch_size=64 --apgd_steps=30 "
        "--targets=3 --queries=300 --examples=100 --results=results/cited_mnist",
    ),
    Question(
        "What is each part of e2SAD's robust preset worth? (held-out images)",
        *("e2sad_parts/compare.md", "e2sad_parts/compare.json"),
        _worth("no memory", "its memory"),
        f"{MNIST} --judge=held_out --parts --steps=2000 --batch_size=64 --last_only --examples=500 --queries=0 "
        "--apgd_steps=30 --targets=3 --results=results/e2sad_parts",
    ),
    Question(
        "What did the second point add to the preset before? (held-out images)",
        *("e2sad_ablation/compare.md", "e2sad_ablation/compare.json"),
        _worth("no second point"),
    ),
    Question(
        "How robust is e2SAD's robust preset on all test images of MNIST?",
        *("e2sad_full_test/compare.md", "e2sad_full_test/compare.json"),
        _seeds,
        f"{ROBUST} --seeds=3 --steps=2500 --batch_size=128 --examples=10000 --queries=200 --apgd_steps=30 --targets=3 "
        "--results=results/e2sad_full_test",
    ),
    Question(
        "How robust is it under the effort of AutoAttack, on 500 images?",
        *("e2sad_full_test/standard/compare.md", "e2sad_full_test/standard/compare.json"),
        _seeds,
        f"{ROBUST} --steps=2500 --batch_size=128 --examples=500 --queries=5000 --apgd_steps=100 --targets=9 "
        "--results=results/e2sad_full_test/standard",
    ),
    Question(
        "Do the paper's tables hold at small scale?", "paper_small/table1.md", "paper_small/table1.json", _table_1
    ),
    Question("What does `make train` give?", "digits/results.md", "digits/e2sad.json", _worst),
    Question("The paper's setting on MNIST, a short run?", "mnist/results.md", "mnist/e2sad.json", _worst),
    Question("And on a part of SVHN?", "svhn_10k/results.md", "svhn_10k/e2sad.json", _worst),
    Question("What does a step cost in FLOPs?", "flops/flops.md", "flops/flops.md", _flops),
    Question(
        "What does a step cost in time? (all defenses, and PyTorch)",
        *("step_cost/step_cost.md", "step_cost/step_cost.json"),
        _step,
        "python -m experiments.step_cost --attack_steps=1,2,10,30 --peer=torch --rounds=3 --seconds=0.3"
        " --results=results/step_cost",
    ),
    Question(
        "And on a processor with AVX-512, every preset of e2SAD?",
        *("step_cost/avx512/step_cost.md", "step_cost/avx512/step_cost.json"),
        _step,
    ),
    Question(
        "And on a processor with AMX, kernel gradients in turns?",
        *("step_cost/amx/step_cost.md", "step_cost/amx/step_cost.json"),
        _step,
    ),
    Question(
        "What are our convolutions worth there, in JAX 0.10?",
        *("step_cost/amx/xla/step_cost.md", "step_cost/amx/xla/step_cost.json"),
        _step,
    ),
    Question(
        "And in JAX 0.12?",
        *("step_cost/amx/xla_jax012/step_cost.md", "step_cost/amx/xla_jax012/step_cost.json"),
        _step,
    ),
    Question(
        "How fast do training images come from the host, and from a file?",
        *("throughput/throughput.md", "throughput/throughput.json"),
        _throughput,
    ),
    Question(
        "Where do the first command's seconds go?",
        *("startup/startup.md", "startup/startup.json"),
        _startup,
        "python -m benchmarks.startup --results=results/startup",
    ),
    Question(
        "What bounds a step on H100s? (compiled for them, not run)",
        *("accelerators/h100/ahead.md", "accelerators/h100/ahead.json"),
        _bounds,
    ),
    Question(
        "And a step of PreActResNet-18 on eight of them?",
        *("accelerators/h100x8_preact_resnet18/ahead.md", "accelerators/h100x8_preact_resnet18/ahead.json"),
        _bounds_and_sums,
    ),
    Question(
        "What bounds a step on TPUs v5e? (compiled for them, not run)",
        *("accelerators/v5e/ahead.md", "accelerators/v5e/ahead.json"),
        _bounds,
        "python -m experiments.step_cost --target=v5e,v5e:2x2,v5e:16x16 --precision=bf16 --defense=natural,fgsm,e2sad "
        "--results=results/accelerators/v5e",
    ),
    Question(
        "Does `evaluation.auto` find what the official AutoAttack code finds, on MNIST?",
        *("attacks_vs_reference/mnist/official.md", "attacks_vs_reference/mnist/official.json"),
        _agreement,
    ),
    Question(
        "And on a part of SVHN?",
        *("attacks_vs_reference/svhn/official.md", "attacks_vs_reference/svhn/official.json"),
        _agreement,
    ),
    Question(
        "And of the full width of the paper's network, `robust2` after 8,000 steps?",
        *("attacks_vs_reference/mnist_full/official.md", "attacks_vs_reference/mnist_full/official.json"),
        lambda result: _official(result["results"][0]),
    ),
    Question(
        "And Square alone in l2?",
        *("attacks_vs_reference/seeds/official.md", "attacks_vs_reference/seeds/official.json"),
        _agreement,
    ),
    Question(
        "And APGD alone, of a network with masked gradients in l2?",
        *("attacks_vs_reference/masked/official.md", "attacks_vs_reference/masked/official.json"),
        _agreement,
    ),
    Question(
        "And of a network that draws noise, by version `rand`?",
        *("attacks_vs_reference/noise/official.md", "attacks_vs_reference/noise/official.json"),
        _agreement,
    ),
    Question(
        "How near to the image do our attacks come, and adv-lib's? (optimality in percent, mean over the networks)",
        *("attacks_vs_reference/mnist/optimality.md", "attacks_vs_reference/mnist/optimality.json"),
        _optimality,
    ),
    Question(
        "And of a robust network on a part of SVHN?",
        *("attacks_vs_reference/svhn/optimality.md", "attacks_vs_reference/svhn/optimality.json"),
        _optimality,
    ),
    Question(
        "Are our attacks as strong as ART's, on MNIST?", "attacks_vs_art/mnist.md", "attacks_vs_art/mnist.md", _peers
    ),
    Question("And on the digits?", "attacks_vs_art/digits.md", "attacks_vs_art/digits.md", _peers),
    Question(
        "Do runs survive kills, full disks and damaged files?",
        *("reliability/torture.md", "reliability/torture.json"),
        _faults,
    ),
    Question(
        "Are damaged inputs refused in one line?",
        *("reliability/fuzz.md", "reliability/fuzz.json"),
        lambda result: f"{sum(t['found'] for t in result['totals'].values())} findings in {result['inputs']:,} inputs",
    ),
    Question(
        "Does memory grow over a long run?",
        *("reliability/soak.md", "reliability/soak.json"),
        lambda result: f"{result['grown']['memory_mb']['by']:.1f} MB over {result['steps']:,} steps",
    ),
)
