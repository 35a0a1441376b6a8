"""A diagnosis in tables and a picture, on a made-up result."""

import base64
from xml.etree import ElementTree

import numpy as np

from e2sad_jax.reporting import diagnosis, provenance

RESULT = {
    "name": "mine",
    "images": 1_500,
    "test_images": 2_000,
    "classes": 9,
    "num_classes": 10,
    "eps": 0.2,
    "norm": "linf",
    "bounds": [0.0, 1.0],
    "clean": 0.98,
    "robust": 0.34,
    "overturned": 0,
    "nan": {"clean": 0},
    "over_eps": {"eps": [0.1, 0.2], "accuracy": {"FGSM": [0.9, 0.8], "PGD-40": [0.7, 0.41]}},
    "over_steps": {"attack": "PGD", "steps": [1, 10], "accuracy": [0.8, 0.5]},
    "over_restarts": {"attack": "PGD-40", "accuracy": [0.41, 0.4]},
    "worst_case": {
        "accuracy": {"clean": 0.98, "APGD-CE": 0.4, "APGD-T": 0.35, "Square": 0.35},
        "fooled": {"APGD-CE": 870, "APGD-T": 75, "Square": 0},
        "stages": [
            {"name": "APGD-CE", "kind": "apgd", "steps": 100, "loss": "ce", "restarts": 1, "targets": 9},
            {"name": "APGD-T", "kind": "apgd", "steps": 100, "loss": "targeted_dlr", "restarts": 1, "targets": 9},
            {"name": "Square", "kind": "square", "steps": 5_000, "loss": "ce", "restarts": 2, "targets": 9},
        ],
        "robust": 0.34,
    },
    "transfer": {"attack": "PGD-40", "from": "natural", "accuracy": 0.9, "accuracy_of_substitute": 0.0},
    "checks": [
        {"name": "PGD beats FGSM", "value": 0.01, "below": True, "bound": 0.02, "suspicious": False},
        {"name": "zero gradients", "value": 0.5, "below": True, "bound": 0.01, "suspicious": True},
    ],
    "verdict": "mine: SUSPICIOUS",
    "command": "python -m experiments.evaluate",
    "environment": {"date": "today", "hardware": "CPU", "python": "3", "jax": "0", "flax": "0", "commit": "c"},
}


def test_markdown_has_every_number_and_its_effort():
    text = diagnosis.markdown(RESULT)
    assert text.startswith("# Robustness of mine\n\nMeasured on 1,500 of 2,000 test images, 9 of 10 classes. mine: SUS")
    assert "| PGD-40 | 0.700 | 0.410 |" in text
    assert "| attack | accuracy | images it fooled |" in text
    assert "| APGD-CE | 0.400 | 870 |" in text
    assert "| all attacks combined, those above included | 0.340 |  |" in text
    assert "- APGD-T: 100 steps towards each of 9 classes, 1 restart." in text
    assert "- Square: 5,000 queries, 2 restarts." in text
    assert "| natural | 0.000 |" in text
    assert "| zero gradients | 0.500 | at most 0.01 | SUSPICIOUS |" in text
    assert f"Command: `{RESULT['command']}`. {provenance.sentence(RESULT['environment'])}\n" in text


NEAREST = {"attack": "FMN-100", "distances": [0.0, None, *[i / 100 for i in range(1, 102)]]}


def test_classes_distances_and_the_paragraph_for_a_card():
    rows = [{"class": k, "images": 10, "clean": 0.9, "robust": k / 100} for k in range(30)]
    text = diagnosis.markdown({**RESULT, "per_class": rows, "nearest": NEAREST, "examples": "examples.png"})
    assert "## Accuracy by class (eps 0.2, all attacks combined, the 20 least robust of 30)" in text
    assert "| 19 | 10 | 0.900 | 0.190 |" in text
    assert "| 20 | 10 |" not in text
    assert (
        "(FMN-100, l-inf), of the 102 images that are classified correctly without attack: median distance 0.51" in text
    )
    assert "from 0.11 to 0.91 for 80 % of them" in text
    none = diagnosis.sentences({**RESULT, "nearest": {**NEAREST, "distances": [0.0, *[None] * 8, 0.01]}})[0]
    assert (
        "of the 9 images that are classified correctly without attack: median distance infinity (none was found)"
        in none
    )
    assert "within images in their range" in diagnosis.paragraph({**RESULT, "bounds": [0.0, [[1.0]]]})
    assert "![Images and their worst images](examples.png)" in text
    card = text.split("## For a model card\n\n")[1].split("\n")[0]
    assert card.startswith(
        "On 1,500 of 2,000 test images, 9 of 10 classes, accuracy is 0.980 without attack and 0.340 under"
    )
    assert "APGD-T: 100 steps towards each of 9 classes, 1 restart" in card
    assert (
        "in l-inf balls of 0.2 within images in [0, 1]. Checks for gradient masking are suspicious (zero gradients)."
        in card
    )


def test_the_page_stands_alone(tmp_path):
    (tmp_path / "evaluation.png").write_bytes(b"picture")
    page = diagnosis.page({**RESULT, "name": "<mine> & yours", "examples": "examples.png"}, tmp_path)
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    assert root.find("head/title").text == "Robustness of <mine> & yours"
    assert [h.text for h in root.iter("h2")] == [table.title for table in diagnosis.tables(RESULT)] + [
        "For a model card"
    ]
    pictures = [image.get("src") for image in root.iter("img")]
    assert pictures == ["data:image/png;base64," + base64.b64encode(b"picture").decode()], (
        "one that is missing is left out"
    )
    cells = [cell.text for cell in root.iter("td")]
    assert "SUSPICIOUS" in cells
    assert "0.410" in cells


def test_text_has_the_verdict_last_and_leaves_out_what_was_not_measured():
    text = diagnosis.text({**RESULT, "worst_case": None, "transfer": None})
    assert text.endswith("\n\nmine: SUSPICIOUS")
    assert "Worst case" not in text
    assert "Transfer" not in text
    assert "Checks for gradient masking" in text


def test_what_no_table_holds_is_said_in_sentences():
    nan = {"clean": 3, "PGD-40": 1_200, "FGSM": 7}
    text = diagnosis.text({**RESULT, "nan": nan, "overturned": 2, "quantized": 0.3456, "norm": "l2"})
    assert (
        "NaN: 3 of 1,500 images have NaN logits, 1,200 of 1,500 images have NaN logits under PGD-40: they count" in text
    )
    assert "2 of 1,500 images fool the model within an attack's program but not in the forward pass" in text
    assert "rounded to grey levels inside the ball: accuracy 0.3456 (0.3400 before rounding)" in text
    assert "Worst case: accuracy after each attack in turn (l2 eps 0.2, 1,500 images)" in text
    assert "NaN" not in diagnosis.text(RESULT)
    verified = {"fooled": 990, "differ": 0, "largest": 0.2, "outside": 0, "batch_sizes": [250, 126]}
    text = diagnosis.text({**RESULT, "verified": verified})
    assert (
        "Verified: 990 of 1,500 images fool the model, in batches of 250 and of 126; all of them lie in the ball"
        in text
    )
    assert "depend on the batch size" not in text
    text = diagnosis.text({**RESULT, "verified": {**verified, "differ": 4, "outside": 3}})
    assert "3 of them lie outside the ball or the range (largest change 0.2)" in text
    assert "4 predictions depend on the batch size." in text


def test_images_and_their_worst_are_drawn(tmp_path):
    images = np.random.default_rng(0).uniform(size=(3, 8, 8, 3)).astype(np.float32)
    path = tmp_path / "a.png"
    diagnosis.examples(path, images, np.clip(images + 0.1, 0, 1), ["1", "2", "3, then 4"], 1.0)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_written(tmp_path):
    diagnosis.plot(tmp_path / "evaluation.png", [RESULT, {**RESULT, "name": "other", "worst_case": None}])
    assert (tmp_path / "evaluation.png").stat().st_size > 5_000
