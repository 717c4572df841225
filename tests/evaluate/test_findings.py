"""Findings of chest X-rays: what prompts say, what tables say, and AUROCs as two libraries have them."""

from pathlib import Path

import numpy as np
import pytest

from arra.errors import ArraError
from arra.evaluate.findings import FindingLabels, findings_auroc, labels_of_prompts, read_findings, read_labels

SAID = {
    "No focal consolidation, pleural effusion, or pneumothorax.": {
        "Consolidation": 0, "Effusion": 0, "Pneumothorax": 0,
    },
    "Small left pleural effusion with adjacent atelectasis. No pneumothorax.": {
        "Effusion": 1, "Atelectasis": 1, "Pneumothorax": 0,
    },
    "No pneumothorax, moderate right effusion": {"Pneumothorax": 0, "Effusion": 1},
    "No large effusion, left lower lobe consolidation or pneumothorax": {
        "Effusion": 0, "Consolidation": 0, "Pneumothorax": 0,
    },
    "No pneumothorax but small bilateral effusions": {"Pneumothorax": 0, "Effusion": 1},
    "Lungs are clear of consolidation or edema": {"Consolidation": 0, "Edema": 0},
    "The pneumothorax has resolved; resolved edema": {"Pneumothorax": 0, "Edema": 0},
    "The effusion is no longer seen": {"Effusion": 0},
    "No significant change in the large right effusion": {"Effusion": 1},
    "Heart size is mildly enlarged": {"Cardiomegaly": 1},
    "The cardiac silhouette is not enlarged": {"Cardiomegaly": 0},
    "Pneumonia cannot be excluded": {"Pneumonia": -1},
    "Left basilar opacity, atelectasis versus pneumonia": {"Lung Opacity": 1, "Atelectasis": -1, "Pneumonia": -1},
    "Consolidation or atelectasis": {"Consolidation": -1, "Atelectasis": -1},
    "Possible effusion without edema": {"Effusion": -1, "Edema": 0},
    "No acute cardiopulmonary process": {},
    "Subcutaneous emphysema, pericardial effusion, massive dilatation": {},
    "No nodule. A 5 mm nodule on the left.": {"Nodule": 1},
    "Possible fracture. No fracture.": {"Fracture": -1},
}  # fmt: skip
"""Prompts and what they say: 1 present, 0 absent, -1 in doubt."""


@pytest.mark.parametrize("prompt", SAID)
def test_prompts_are_read(prompt: str) -> None:
    assert read_findings(prompt) == SAID[prompt]


def test_what_is_not_mentioned_is_absent_unless_a_narrower_finding_is_there() -> None:
    prompts = ["A nodule.", "Clear lungs.", "No nodule.", "A nodule, no other lesion."]
    labels = labels_of_prompts(prompts, findings=("Nodule", "Lung Lesion", "Hernia", "Lung Opacity"))
    assert labels.values.tolist() == [[1, -1, 0, -1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, -1]]
    with pytest.raises(ArraError, match="finding 'Gout': prompts are not read for it; known are Atelectasis"):
        labels_of_prompts(prompts, findings=("Gout",))


def test_tables_are_read(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("id,Pleural Effusion,pleural thickening,Gout\na,1,,1\nb,0.0,-1,\nc,,1,0\n")
    labels = read_labels(path, ids=["c", "a", "b"], findings=("Effusion", "Pleural_Thickening", "Mass"))
    assert labels.values.tolist() == [[0, 1, -1], [1, 0, -1], [0, -1, -1]]
    with pytest.raises(ArraError, match=r"labels\.csv: no whole row for picture d and 1 more; add it"):
        read_labels(path, ids=["a", "d", "e"], findings=("Effusion",))
    with pytest.raises(ArraError, match=r"labels\.csv: none of its columns \(id, .*Gout\) is a finding; expected id"):
        read_labels(path, ids=["a"], findings=("Mass",))
    path.write_text("id,Mass\na,yes\n")
    with pytest.raises(ArraError, match=r"labels\.csv: row 2, Mass: 'yes'; expected 1 \(present\)"):
        read_labels(path, ids=["a"], findings=("Mass",))
    path.write_text("id,Mass\na,1\na,1\nb,1\nb,0\n")
    assert read_labels(path, ids=["a"], findings=("Mass",)).values.tolist() == [[1]]
    with pytest.raises(ArraError, match=r"labels\.csv: rows 4 and 5 are both of picture b and differ; keep one"):
        read_labels(path, ids=["a", "b"], findings=("Mass",))
    for broken in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(ArraError, match="not a readable table"):
            read_labels(broken, ids=["a"], findings=("Mass",))


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, FindingLabels]:
    """Scores with many ties of 90 pictures; of the third finding too few have it."""
    generator = np.random.default_rng(0)
    values = generator.choice([1, 0, -1], size=(90, 3), p=[0.3, 0.5, 0.2]).astype(np.int8)
    values[:, 2] = np.where(np.arange(90) < 9, 1, 0)
    scores = (generator.integers(0, 6, size=(90, 3)) + values.clip(0)) / 7
    return scores.astype(np.float32), FindingLabels(("Mass", "Edema", "Hernia"), values)


def test_aurocs_equal_torchmetrics_and_pairs(drawn: tuple[np.ndarray, FindingLabels]) -> None:
    binary_auroc = pytest.importorskip("torchmetrics.functional.classification").binary_auroc
    import torch

    scores, labels = drawn
    found = findings_auroc(scores, labels)
    assert list(found.by_finding) == ["Mass", "Edema"]
    for column, measured in enumerate(found.by_finding.values()):
        known = labels.values[:, column] >= 0
        given, target = scores[known, column], labels.values[known, column]
        theirs = binary_auroc(torch.from_numpy(given), torch.from_numpy(target).long()).item()
        assert measured.value == pytest.approx(theirs, abs=1e-6)
        pairs = np.sign(given[target == 1][:, None] - given[target == 0][None]).astype(np.float64)
        assert measured.value == pytest.approx((pairs.mean() + 1) / 2, rel=1e-12)
        assert measured.per_picture.mean() == pytest.approx(measured.value, rel=1e-12)
    assert found.macro is not None
    assert found.macro.value == pytest.approx(np.mean([each.value for each in found.by_finding.values()]))
    assert found.macro.per_picture.mean() == pytest.approx(found.macro.value, rel=1e-12)
    assert found.left_out == {"Hernia": "9 pictures with it and 81 without; needs 10 each"}


def test_per_picture_values_are_the_derivative(drawn: tuple[np.ndarray, FindingLabels]) -> None:
    scores, labels = drawn
    measured = findings_auroc(scores, labels).by_finding["Mass"]
    target, given, step = labels.values[:, 0], scores[:, 0].astype(np.float64), 1e-5

    def weighted(weights: np.ndarray) -> float:
        there, none = target == 1, target == 0
        pairs = (np.sign(given[there][:, None] - given[none][None]) + 1) / 2
        return float(weights[there] @ pairs @ weights[none] / (weights[there].sum() * weights[none].sum()))

    for row in range(0, 90, 7):  # some picture's weight goes from 1/N up by `step`, the others' down
        weights = np.full(90, (1 - step) / 90)
        weights[row] += step
        slope = (weighted(weights) - measured.value) / step
        assert measured.per_picture[row] - measured.value == pytest.approx(slope, abs=1e-3)


def test_what_cannot_be_measured_is_told(drawn: tuple[np.ndarray, FindingLabels]) -> None:
    scores, labels = drawn
    with pytest.raises(ArraError, match=r"scores \(5, 3\) and labels \(90, 3\)"):
        findings_auroc(scores[:5], labels)
    with pytest.raises(ArraError, match="scores that are not finite"):
        findings_auroc(np.where(scores == scores[0, 0], np.nan, scores), labels)
    few = findings_auroc(scores[:12], FindingLabels(labels.findings, labels.values[:12]))
    assert few.macro is None
    assert set(few.left_out) == set(labels.findings)
