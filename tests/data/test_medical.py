"""MIMIC-CXR and DeepEyeNet on tiny folders of the official layout."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from arra.data.medical import DeepEyeNetSource, MimicCxrSource, find_impression
from arra.data.reading import ImageReader
from arra.data.records import Failure, Found, Record, Skipped, Source
from arra.errors import ArraError

REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___F with new onset ascites  // eval for infection

 COMPARISON:  None.

 FINDINGS:

 There is no focal consolidation. IMPRESSION: is not here.

 IMPRESSION:

 No acute cardiopulmonary process.  No evidence of free air
 beneath the diaphragms.

 NOTIFICATION:  Dr. ___ was told.
""".replace("\n\n", "\n \n")  # blank lines hold a space, as in the official files
IMPRESSION = "No acute cardiopulmonary process.  No evidence of free air beneath the diaphragms."


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 6), number).save(buffer, "JPEG")
    return buffer.getvalue()


def dicom(number: int) -> str:
    return "-".join(f"{number * 7 + place:08x}" for place in range(5))


class Mimic:
    """A folder laid out as MIMIC-CXR-JPG, written when it is scanned."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: list[list[str]] = []
        self.splits: list[list[str]] = []
        (root / "files").mkdir(parents=True)

    def add(self, number: int, view: str = "PA", *, split: str = "train", report: str | bytes | None = REPORT) -> str:
        study = 50414267 + number // 2
        folder = self.root / "files" / "p10" / "p10000032"
        (folder / f"s{study}").mkdir(parents=True, exist_ok=True)
        (folder / f"s{study}" / f"{dicom(number)}.jpg").write_bytes(jpeg(number % 256))
        if report is not None:
            (folder / f"s{study}.txt").write_bytes(report.encode() if isinstance(report, str) else report)
        # as in the official file: id, subject, study, procedure, view, and more
        self.rows.append([dicom(number), "10000032", str(study), "CHEST (PA AND LAT)", view, "3056", "2544"])
        self.splits.append([dicom(number), str(study), "10000032", split])
        return dicom(number)

    def scan(self, *, packed: bool = False, **fields: Any) -> list[Found]:
        header = "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns"
        for name, head, rows in [
            ("metadata", header, self.rows),
            ("split", "dicom_id,study_id,subject_id,split", self.splits),
        ]:
            content = "\n".join([head, *map(",".join, rows)]).encode("utf-8", "surrogateescape")
            path = self.root / f"mimic-cxr-2.0.0-{name}.csv{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
        return scan(MimicCxrSource(path=str(self.root), **fields))


def scan(source: Source) -> list[Found]:
    items = list(source.scan())
    assert all("\n" not in item.reason for item in items if not isinstance(item, Record))
    return items


@pytest.fixture
def mimic(tmp_path: Path) -> Mimic:
    return Mimic(tmp_path / "mimic-cxr-jpg")


@pytest.mark.parametrize("packed", [False, True])
def test_mimic_prompts_are_the_papers(mimic: Mimic, packed: bool) -> None:
    for number, (view, split) in enumerate([("AP", "train"), ("PA", "validate"), ("LATERAL", "test")]):
        mimic.add(number, view, split=split)
    found = mimic.scan(packed=packed)
    assert all(isinstance(item, Record) for item in found), found
    records = [item for item in found if isinstance(item, Record)]
    assert records[0].prompt == (
        "AP view chest x-ray image, No acute cardiopulmonary process.  No evidence of free air beneath the diaphragms."
    )
    assert [(r.id, r.split, r.group) for r in records] == [
        (dicom(0), "train", "s50414267"),
        (dicom(1), "validation", "s50414267"),
        (dicom(2), "test", "s50414268"),
    ]
    assert [ImageReader().read(r.image) for r in records if r.image] == [jpeg(0), jpeg(1), jpeg(2)]
    assert records[1].where.endswith(f"metadata.csv{'.gz' if packed else ''}: line 3")


@pytest.mark.parametrize(
    ("report", "impression"),
    [
        (REPORT, IMPRESSION),
        (REPORT.replace(" IMPRESSION:\n", " Impression:"), IMPRESSION),
        (REPORT.replace("\n", "\r\n"), IMPRESSION),
        (" FINDINGS: a\n\n IMPRESSION:  1.  First. \n \n 2. Second", "1.  First. 2. Second"),
        (" IMPRESSION: old\n FINAL REPORT\n FINDINGS: x\n IMPRESSION: new\n", "new"),
        (" IMPRESSION: early view\n                  FINAL REPORT\n text", "early view"),
        (" IMPRESSION: kept\n WET READ VERSION (1): x\n RECOMMENDATION(S):  y", "kept WET READ VERSION (1): x"),
        (" IMPRESSION: kept\n RECOMMENDATION(S):  y", "kept"),
        (" CONCLUSION: not taken", ""),
        (" FINDINGS: a. IMPRESSION: not at the start of a line", ""),
        (" IMPRESSION:\n\n FINDINGS: none before", ""),
        ("", ""),
    ],
)
def test_the_impression_section(report: str, impression: str) -> None:
    assert find_impression(report) == impression


def test_mimic_leaves_out_by_rule_and_tells(mimic: Mimic) -> None:
    mimic.add(0, "LL")
    mimic.add(2, "")
    mimic.add(4, report=None)
    mimic.add(6, report=" FINDINGS: only\n")
    mimic.add(8)
    items = mimic.scan()
    assert [type(item) for item in items] == [Skipped] * 4 + [Record]
    reasons = [item.reason for item in items if isinstance(item, Skipped)]
    assert reasons[0] == "view 'LL' is not among AP, PA, LATERAL"
    assert reasons[1:] == [
        "view '' is not among AP, PA, LATERAL",
        "no report of its study",
        "no impression in its report",
    ]
    assert [type(item) for item in mimic.scan(views=("LL",))] == [Record] + [Skipped] * 4


def test_mimic_failures_cost_only_their_row(mimic: Mimic, tmp_path: Path) -> None:
    (mimic.root / "files" / "p10" / "p10000032" / "s50414267" / f"{mimic.add(0)}.jpg").unlink()
    mimic.add(2, report=b" IMPRESSION: caf\xe9")
    mimic.add(4, report="x" * (2**20 + 1))
    mimic.add(6)
    mimic.splits.pop()
    for place, hostile in enumerate(["../../../etc/passwd", "1000003\u0662", "10000032\x00"]):
        mimic.rows.append([dicom(8), "10000032", "50414267", "", "PA"])
        mimic.rows[-1][place % 3] = hostile
        mimic.rows[-1] += ["", ""]
    mimic.rows.append([dicom(8)])
    mimic.rows.append([dicom(8), "10000032", "50414267", "", "P\udce9", "", ""])
    mimic.add(10)
    items = mimic.scan()
    assert [type(item) for item in items] == [Failure] * 9 + [Record]
    reasons = [
        "does not exist",
        "not UTF-8",
        "more than",
        "no line for it",
        *["no MIMIC-CXR ids"] * 3,
        "1 fields",
        "not UTF-8",
    ]
    for item, reason in zip(items, reasons, strict=False):
        assert isinstance(item, Failure)
        assert reason in item.reason


def test_mimic_keeps_the_same_test_pairs_in_any_order(mimic: Mimic) -> None:
    for number in range(0, 40, 2):
        mimic.add(number, split="test", report=REPORT if number % 4 else " FINDINGS: only\n")
    mimic.add(50)
    first = mimic.scan(max_test=4)
    kept = {item.id for item in first if isinstance(item, Record) and item.split == "test"}
    assert len(kept) == 4
    mimic.rows.reverse()
    again = mimic.scan(max_test=4)
    assert {item.id for item in again if isinstance(item, Record) and item.split == "test"} == kept
    assert sum("max_test" in item.reason for item in again if isinstance(item, Skipped)) == 6
    assert len([item for item in mimic.scan(max_test=None) if isinstance(item, Record)]) == 11
    assert len([item for item in mimic.scan() if isinstance(item, Record)]) == 11


def test_mimic_reports_lie_where_they_may(mimic: Mimic, tmp_path: Path) -> None:
    mimic.add(0, report=None)
    for place in (
        tmp_path / "elsewhere",
        tmp_path / "elsewhere" / "mimic-cxr-reports",
        mimic.root / "mimic-cxr-reports",
    ):
        report = place / "files" / "p10" / "p10000032" / "s50414267.txt"
        report.parent.mkdir(parents=True)
        report.write_text(f" IMPRESSION: {place.name}\n")
    given: list[str | None] = [str(tmp_path / "elsewhere"), str(tmp_path / "elsewhere" / "mimic-cxr-reports"), None]
    for reports in given:
        (item,) = mimic.scan(reports=reports)
        assert isinstance(item, Record)
        assert item.prompt == "PA view chest x-ray image, mimic-cxr-reports"


def test_mimic_sections_from_the_table(mimic: Mimic) -> None:
    for number in (0, 2, 4):
        mimic.add(number, report=None)
    table = (
        'study,impression,findings,last_paragraph,comparison\ns50414267,"One.  Two\n three.",,,\ns50414268,,Seen.,,\n'
        "s50414269,caf\udce9,,,\n"
    )
    path = mimic.root / "mimic_cxr_sectioned.csv"
    path.write_bytes(table.encode("utf-8", "surrogateescape"))
    for reports in (None, str(path)):
        broken, first, second, third = mimic.scan(reports=reports)
        assert isinstance(broken, Failure)
        assert broken.id == f"{path}: line 5"
        assert isinstance(first, Record)
        assert first.prompt == "PA view chest x-ray image, One.  Two three."
        assert [getattr(item, "reason", "") for item in (second, third)] == [
            "no impression in its report",
            "no report of its study",
        ]


def test_mimic_files_may_lie_on_another_disk(mimic: Mimic, tmp_path: Path) -> None:
    mimic.add(0)
    (mimic.root / "files").rename(tmp_path / "disk")
    (mimic.root / "files").symlink_to(tmp_path / "disk")
    assert [type(item) for item in mimic.scan()] == [Record]


def test_a_folder_that_is_not_mimic_is_refused(mimic: Mimic, tmp_path: Path) -> None:
    with pytest.raises(ArraError, match=r"no mimic-cxr-2\.0\.0-split\.csv"):
        scan(MimicCxrSource(path=str(mimic.root)))
    mimic.add(0)
    with pytest.raises(ArraError, match="no reports"):
        mimic.scan(reports=str(tmp_path / "none"))
    (mimic.root / "mimic-cxr-2.0.0-split.csv").write_text("dicom,split\n")
    with pytest.raises(ArraError, match="expected the columns dicom_id, split"):
        scan(MimicCxrSource(path=str(mimic.root)))


def eyes(root: Path, **splits: Any) -> Path:
    for name in ("train", "valid", "test"):
        items = splits.get(name, [])
        (root / f"DeepEyeNet_{name}.json").write_bytes(
            items if isinstance(items, bytes) else json.dumps(items).encode()
        )
        for item in items if isinstance(items, list) else []:
            for key in item if isinstance(item, dict) else []:
                if key.startswith("eyenet0420/"):
                    (root / key).parent.mkdir(parents=True, exist_ok=True)
                    (root / key).write_bytes(jpeg(len(key)))
    return root


def eye(name: str, description: Any = "color fundus, 54-year-old", **texts: Any) -> dict[str, Any]:
    return {f"eyenet0420/{name}": {"keywords": "drusen, amd", "clinical-description": description, **texts}}


def test_deepeyenet_descriptions_become_prompts(tmp_path: Path) -> None:
    splits = {
        "train": [eye("train_set/group1-train/1.jpg")],
        "valid": [eye("val_set/a.jpg")],
        "test": [eye("test_set/a.jpg")],
    }
    eyes(tmp_path, **splits)
    items = scan(DeepEyeNetSource(path=str(tmp_path)))
    records = [item for item in items if isinstance(item, Record)]
    assert [(r.id, r.split) for r in records] == [
        ("eyenet0420/train_set/group1-train/1.jpg", "train"),
        ("eyenet0420/val_set/a.jpg", "validation"),
        ("eyenet0420/test_set/a.jpg", "test"),
    ]
    assert {(r.prompt, r.alternatives) for r in records} == {("color fundus, 54-year-old", ())}
    assert records[0].where == f"{tmp_path / 'DeepEyeNet_train.json'}: item 1"
    assert records[0].image is not None
    assert ImageReader().read(records[0].image) == jpeg(len(records[0].id))
    again = scan(DeepEyeNetSource(path=str(tmp_path), use_keywords=True))
    assert [r.alternatives for r in again if isinstance(r, Record)] == [("drusen, amd",)] * 3


def test_deepeyenet_tells_what_it_leaves_out(tmp_path: Path) -> None:
    items = [eye(f"{n}.jpg", text) for n, text in enumerate(["", "  ", "NaN", None, "None"])]
    wrong: list[Any] = [
        "text",
        {},
        {"a": {}, "b": {}},
        {"eyenet0420/x.jpg": "text"},
        eye("y.jpg", 7),
        eye("z.jpg", "caf\udce9"),
    ]
    eyes(tmp_path, train=[*items, *wrong, {"../secret.jpg": {"clinical-description": "x"}}, eye("last.jpg")])
    content = (tmp_path / "DeepEyeNet_train.json").read_bytes().replace(b"\\udce9", b"\xe9")
    (tmp_path / "DeepEyeNet_train.json").write_bytes(content)
    (tmp_path.parent / "secret.jpg").write_bytes(jpeg(1))
    found = scan(DeepEyeNetSource(path=str(tmp_path)))
    assert [type(item) for item in found] == [Skipped] * 5 + [Failure] * 7 + [Record]
    reasons = [item.reason for item in found if isinstance(item, Failure)]
    assert "expected an object with one key" in reasons[0]
    assert "not UTF-8" in reasons[5]
    assert "leaves" in reasons[6]


def test_deepeyenet_keeps_the_same_pairs(tmp_path: Path) -> None:
    items = [eye(f"{n}.jpg") for n in range(12)]
    kept = []
    for order in (items, items[::-1]):
        found = scan(DeepEyeNetSource(path=str(eyes(tmp_path, train=order, test=order[:3])), max_train=5, max_test=2))
        kept.append([{i.id for i in found if isinstance(i, Record) and i.split == name} for name in ("train", "test")])
        assert len(found) == 15
        assert sum("max_train" in item.reason for item in found if isinstance(item, Skipped)) == 7
    assert kept[0][0] == kept[1][0]
    assert [len(names) for names in kept[0]] == [5, 2]


def test_a_folder_that_is_not_deepeyenet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ArraError, match=r"DeepEyeNet_train\.json, DeepEyeNet_valid\.json, DeepEyeNet_test\.json not found"
    ):
        scan(DeepEyeNetSource(path=str(tmp_path)))
    for content, reason in [(b"[", "not JSON"), (b"{}", "holds dict"), (b"[" * 100_000, "not JSON")]:
        with pytest.raises(ArraError, match=reason):
            scan(DeepEyeNetSource(path=str(eyes(tmp_path, train=content))))
