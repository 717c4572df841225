"""Whether a chest X-ray shows what its prompt says: AUROC of a classifier's findings against the prompts' own.

    scores (N, C): output `findings` of an xrv space --.
    prompts --labels_of_prompts--. (or a table)        +--> findings_auroc --> one number a finding, and their mean
                                 +--> FindingLabels ---'

0.5 is what pictures give that have nothing to do with their prompts. Real pictures of the same prompts are the ceiling:
no classifier and no reader of prompts is perfect, so a number means little without the real pictures' beside it.

What a prompt says is read by rules: a finding is looked for by its usual words, sentence by sentence, and a mention is
taken back by a word of negation before it ("no", "without", "clear of", ...) or after it ("has resolved", "is not
seen"), which reaches over a list up to "but" or the sentence's end, or set aside by a word of doubt ("possible", "may",
"versus", ...). Of several mentions the surest counts: present before doubtful before absent. A finding that is not
mentioned counts as absent, unless a narrower one is present (a nodule leaves "Lung Lesion" open); doubtful and open
ones are left out of that finding's AUROC. This is in the manner of NegEx, made for short impressions in English; it is
not CheXpert's labeller, knows no grammar, takes "vascular congestion" for nothing and every "opacity" for one of the
lung. Where labels exist, give them as a table.

Source: Chapman et al. 2001 (NegEx); Irvin et al. 2019 (CheXpert: order of mentions, hierarchy of findings);
DeLong et al. 1988 (spread of an AUROC).

Legend: N pictures, C findings.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float64, Int8

from arra.errors import ArraError
from arra.evaluate.measured import Measured

LEAST_EACH = 10
"""Pictures with and without a finding, below which its AUROC says nothing."""
PRESENT, ABSENT, UNKNOWN = 1, 0, -1
WORDS: Mapping[str, str] = {
    "Atelectasis": r"atelecta\w*|(?:lobar|lobe|lung) collapse|collapsed (?:lung|lobe)",
    "Consolidation": r"consolidat\w*",
    "Infiltration": r"infiltrat\w*",
    "Pneumothorax": r"\w*pneumothora\w*",
    "Edema": r"o?edema\w*",
    "Emphysema": r"(?<!subcutaneous )(?<!tissue )emphysema\w*",
    "Fibrosis": r"fibro(?:sis|tic)",
    "Effusion": r"(?<!pericardial )effusions?|pleural fluid|\w*hydrothora\w*",
    "Pneumonia": r"(?:broncho)?pneumonias?|infectious process",
    "Pleural_Thickening": r"pleural (?:\w+ )?thickening|apical thickening",
    "Cardiomegaly": (
        r"cardiomegaly|enlarged (?:heart|cardiac silhouette)|enlargement of the (?:heart|cardiac silhouette)|"
        r"(?:heart|cardiac)(?: size| silhouette)? (?:is|remains|appears) (?:\w+ ){0,2}enlarged"
    ),
    "Nodule": r"\w*nodul\w*",
    "Mass": r"mass(?:es)?",
    "Hernia": r"hernia\w*",
    "Lung Lesion": r"lesions?",
    "Fracture": r"fractur\w*",
    "Lung Opacity": r"opaci\w*",
    "Enlarged Cardiomediastinum": (
        r"(?:widened|enlarged) (?:\w+ )?(?:mediastinum|cardiomediastin\w*)|mediastinal widening|"
        r"widening of the (?:\w+ )?mediastinum|mediastinum is (?:\w+ ){0,2}widened"
    ),
}
"""How each finding of torchxrayvision's classifiers is said."""
NARROWER: Mapping[str, tuple[str, ...]] = {
    "Lung Opacity": (
        "Atelectasis", "Consolidation", "Infiltration", "Edema", "Pneumonia", "Nodule", "Mass", "Lung Lesion",
    ),
    "Consolidation": ("Pneumonia",),
    "Infiltration": ("Consolidation", "Pneumonia", "Lung Opacity"),
    "Lung Lesion": ("Nodule", "Mass"),
    "Enlarged Cardiomediastinum": ("Cardiomegaly",),
}  # fmt: skip
"""Findings whose presence leaves a wider, unmentioned one open."""
ALSO_CALLED = {"pleural effusion": "Effusion", "oedema": "Edema", "airspace opacity": "Lung Opacity"}
"""Columns of other tables, as CheXpert's."""

UNCHANGED = re.compile(
    r"\b(?:no|without|not)(?: \w+){0,2} (?:changes?|changed|increase|decrease|improvement|worsening|progression)\b"
)
"""Says nothing about presence, though it holds a negation."""
NEGATED_BEFORE = (
    r"no|not|without|absence of|free of|clear of|negative for|denies|rather than|never|neither|nor|resolved|"
    r"resolution of|ruled out|exclude[sd]?"
)
DOUBTED_BEFORE = (
    r"possibl[ey]|probabl[ey]|may|might|could|can ?not exclude|cannot be excluded|questionabl[ey]|question of|"
    r"suspect\w*|suspicio\w*|suggest\w*|concern\w*|likely|versus|vs|borderline|rule out|evaluate for|assess for|"
    r"differential"
)
NEGATED_AFTER = re.compile(
    r"^(?: \w+){0,4} (?:"
    r"(?:has|have|had|is|are|now|completely|since)(?: \w+)? (?:resolved|cleared|absent|excluded|gone)|"
    r"(?:is|are|was|were) (?:not|no longer)\b|not (?:seen|identified|present|visible|visualized|detected)|"
    r"(?:is|are) ruled out|resolved\b)"
)
DOUBTED_AFTER = re.compile(
    r"^(?: \w+){0,4} (?:can ?not be (?:excluded|ruled out)|not excluded|versus|vs|"
    r"(?:is|are)(?: \w+)? (?:possible|suspected|likely|questioned))\b|^ (?:versus|vs|or)\b"
)
CHOICE_BEFORE = re.compile(r"\bor (?:\w+ ){0,2}$")
CLAUSE_ENDS = re.compile(r"\b(?:but|however|although|though|yet|except|apart from|aside from|there (?:is|are)|which)\b")
NEW_ITEM = re.compile(
    r", (?=(?:and |with )?(?:an? )?(?:mild|moderate|severe|small|large|tiny|minimal|stable|unchanged|new|increas\w+|"
    r"worsen\w+|persistent|bilateral|left|right|marked)\b)"
)
"""Where a list of what is absent may go over into what is there: told by the words that size a finding."""


@dataclass(frozen=True)
class FindingLabels:
    """What is known of each picture: 1 present, 0 absent, -1 not known and left out."""

    findings: tuple[str, ...]
    values: Int8[np.ndarray, "N C"]


@dataclass(frozen=True)
class FindingsAuroc:
    """How well a classifier's scores tell pictures whose prompt has a finding from those whose prompt has not."""

    by_finding: dict[str, Measured]
    macro: Measured | None
    """The mean over those findings; None where there are none."""
    left_out: dict[str, str]
    """By finding, why it has no number."""


def read_findings(prompt: str) -> dict[str, int]:
    """What a prompt says of each finding of `WORDS` that it mentions: 1 present, 0 absent, -1 in doubt."""
    found: dict[str, int] = {}
    text = " ".join(prompt.lower().replace("_", " ").split())
    for sentence in re.split(r"[.;:!?]+(?: |$)", text):
        sentence = UNCHANGED.sub(" ", sentence)
        for finding, words in WORDS.items():
            for mention in re.finditer(rf"\b(?:{words})\b", sentence):
                said = _said(sentence, mention)
                rank = (ABSENT, UNKNOWN, PRESENT)
                if finding not in found or rank.index(said) > rank.index(found[finding]):
                    found[finding] = said
    return found


def labels_of_prompts(prompts: Sequence[str], *, findings: Sequence[str]) -> FindingLabels:
    """The labels that prompts tell, for the findings of a classifier; see the module for how and how well.

    Raises:
        ArraError: a finding that the reader has no words for.
    """
    for finding in findings:
        if finding not in WORDS:
            raise ArraError(f"finding '{finding}': prompts are not read for it; known are {', '.join(WORDS)}")
    values = np.zeros((len(prompts), len(findings)), dtype=np.int8)
    told: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        if prompt not in told:
            said = read_findings(prompt)
            told[prompt] = [said.get(finding, _unmentioned(finding, said)) for finding in findings]
        values[row] = told[prompt]
    return FindingLabels(tuple(findings), values)


def read_labels(path: str | Path, *, ids: Sequence[str], findings: Sequence[str]) -> FindingLabels:
    """Labels out of a CSV table: column `id` (or the first one), and a column for each finding that it knows.

    A cell is 1 (present), 0 or empty (absent) or -1 (left out), as in CheXpert's and MIMIC-CXR's tables. Findings
    without a column are not known of any picture. Names of columns are compared without case, blanks and underscores.

    Raises:
        ArraError: no readable table, no column for any finding, a cell that means nothing, or a picture without a row
            or with two that differ.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ArraError(f"{path}: not a readable table ({' '.join(str(error).split())[:120]}); expected CSV") from error
    head = rows[0] if rows else []
    names = [_plain(ALSO_CALLED.get(column.strip().lower(), column)) for column in head]
    columns = {finding: names.index(_plain(finding)) for finding in findings if _plain(finding) in names}
    if not columns:
        raise ArraError(
            f"{path}: none of its columns ({', '.join(head)[:120]}) is a finding; expected id and some of "
            f"{', '.join(findings)}"
        )
    of_id = names.index("id") if "id" in names else 0
    by_id: dict[str, tuple[int, list[str]]] = {}
    asked = set(ids)
    for number, row in enumerate(rows[1:], 2):
        if len(row) == len(head) and row[of_id] in asked and by_id.setdefault(row[of_id], (number, row))[1] != row:
            first = by_id[row[of_id]][0]
            raise ArraError(f"{path}: rows {first} and {number} are both of picture {row[of_id]} and differ; keep one")
    if absent := [each for each in ids if each not in by_id]:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ArraError(f"{path}: no whole row for picture {absent[0]}{more}; add it, or leave the picture out")
    values = np.full((len(ids), len(findings)), UNKNOWN, dtype=np.int8)
    for place, each in enumerate(ids):
        number, row = by_id[each]
        for finding, column in columns.items():
            values[place, findings.index(finding)] = _cell(row[column], f"{path}: row {number}, {head[column]}")
    return FindingLabels(tuple(findings), values)


def findings_auroc(scores: Float[np.ndarray, "N C"], labels: FindingLabels) -> FindingsAuroc:
    """The AUROC of each finding with its per-picture values, ties counted half, and the mean over findings.

    A picture's value is the AUROC plus its influence: how much likelier than the AUROC it is on the right side of a
    picture of the other kind, over the share of its own kind. The spread of their mean is DeLong's.

    Raises:
        ArraError: scores of other pictures or findings than the labels, or not finite.
    """
    if scores.shape != labels.values.shape:
        raise ArraError(
            f"findings: scores {scores.shape} and labels {labels.values.shape}; expected one score for each label"
        )
    if not np.isfinite(scores).all():
        raise ArraError("findings: scores that are not finite; look at the pictures and at the classifier's weights")
    by_finding: dict[str, Measured] = {}
    left_out: dict[str, str] = {}
    for column, finding in enumerate(labels.findings):
        is_there, is_not = (labels.values[:, column] == value for value in (PRESENT, ABSENT))
        if min(is_there.sum(), is_not.sum()) < LEAST_EACH:
            left_out[finding] = f"{is_there.sum()} pictures with it and {is_not.sum()} without; needs {LEAST_EACH} each"
        else:
            by_finding[finding] = _auroc(scores[:, column].astype(np.float64), is_there, is_not)
    if not by_finding:
        return FindingsAuroc(by_finding, None, left_out)
    value = float(np.mean([each.value for each in by_finding.values()]))
    per_picture = np.mean([each.per_picture for each in by_finding.values()], axis=0)
    return FindingsAuroc(by_finding, Measured(value=value, per_picture=per_picture), left_out)


def _auroc(
    scores: Float64[np.ndarray, "N"], is_there: Bool[np.ndarray, "N"], is_not: Bool[np.ndarray, "N"]
) -> Measured:
    with_it, without = np.sort(scores[is_there]), np.sort(scores[is_not])
    above = (
        np.searchsorted(without, scores[is_there], "left") + np.searchsorted(without, scores[is_there], "right")
    ) / 2
    below = (np.searchsorted(with_it, scores[is_not], "left") + np.searchsorted(with_it, scores[is_not], "right")) / 2
    right_there, right_not = above / len(without), 1 - below / len(with_it)
    value = float(right_there.mean())
    per_picture = np.full(len(scores), value)
    per_picture[is_there] += (right_there - value) * len(scores) / len(with_it)
    per_picture[is_not] += (right_not - value) * len(scores) / len(without)
    return Measured(value=value, per_picture=per_picture)


def _said(sentence: str, mention: re.Match[str]) -> int:
    """What a sentence says of one mention."""
    if re.search(r"\bnot\b", mention[0]):
        return ABSENT
    before, after = sentence[: mention.start()], sentence[mention.end() :]
    before = CLAUSE_ENDS.split(before)[-1]
    after = re.split(r",|\band\b", CLAUSE_ENDS.split(after)[0])[0]
    if not re.search(r"\b(?:or|nor)\b", sentence[mention.end() :]) and not re.search(r"\bor\b", before):
        before = NEW_ITEM.split(before)[-1]
    cues = list(re.finditer(rf"\b(?:(?P<doubt>{DOUBTED_BEFORE})|(?P<no>{NEGATED_BEFORE}))\b", before))
    # "no possible effusion" is no effusion, "possible effusion without edema" no edema: negation wins
    if any(cue["no"] for cue in cues) or (NEGATED_AFTER.search(after) and not DOUBTED_AFTER.search(after)):
        return ABSENT
    return UNKNOWN if cues or DOUBTED_AFTER.search(after) or CHOICE_BEFORE.search(before) else PRESENT


def _unmentioned(finding: str, said: Mapping[str, int]) -> int:
    narrower = NARROWER.get(finding, ())
    return UNKNOWN if any(said.get(each) in (PRESENT, UNKNOWN) for each in narrower) else ABSENT


def _plain(name: str) -> str:
    return re.sub(r"[\s_]+", "", name).lower()


def _cell(text: str, place: str) -> int:
    if not text.strip():
        return ABSENT
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if value not in (PRESENT, ABSENT, UNKNOWN):
        raise ArraError(f"{place}: {text[:40]!r}; expected 1 (present), 0 or nothing (absent) or -1 (not known)")
    return int(value)
