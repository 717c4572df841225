"""A painted set in the form that CheXGenBench reads, beside its own scripts: `arra export SET OUT --to chexgenbench`.

    OUT/  CSV/prompt_INFO.csv        a row for each picture
          synthetic_images/NAME.png  the pictures

The two folders are those of the benchmark's `assets/`. Its scripts name the same two columns differently: its README
and `fid.py` say `img_savename`, `img_text_alignment_scores.py` and `frd.py` `synthetic_filename`; the README says
`prompt`, all scripts ask for `annotated_prompt` unless told otherwise. All four are written.

Source: Raman1121/CheXGenBench, README.md, metrics/ and scripts/.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from arra.errors import ArraError
from arra.evaluate.sets import PictureSet
from arra.runs import atomic_file, atomic_write, writing
from arra.stages.picture_folders import in_threads
from arra.stages.process import Progress, silent

TABLE, PICTURES = Path("CSV") / "prompt_INFO.csv", Path("synthetic_images")
COLUMNS = ("prompt", "annotated_prompt", "img_savename", "synthetic_filename")
PICTURES_AT_A_TIME = 64


@dataclass(frozen=True)
class ExportedSet:
    """What was written."""

    path: Path
    num_images: int
    num_prompts: int
    """Different ones."""

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What there is to say, as a table of names and values."""
        each = "" if self.num_images == self.num_prompts else "; the benchmark paints one for each, and counts all"
        return [
            ("pictures", f"{self.num_images} of {self.num_prompts} prompts{each}"),
            ("table", f"{self.path / TABLE}, columns {', '.join(COLUMNS)}"),
        ]

    @property
    def hint(self) -> str:
        """What to do with it."""
        return (
            f"for CheXGenBench: copy what is in {self.path} into its assets/, then ./scripts/image_quality_metrics.sh; "
            "its conditional metrics look prompts up in LLAVARAD_ANNOTATIONS_TEST.csv, letter by letter"
        )


def export_set(pictures: PictureSet, out: Path, *, progress: Progress = silent) -> ExportedSet:
    """What was written of a set whose prompts are known; `out` must be new. The table comes last.

    Raises:
        ArraError: pictures without prompts, `out` is there already, or it cannot be written.
    """
    prompts = pictures.prompts
    if prompts is None:
        raise ArraError(
            f"{pictures.name}: CheXGenBench wants the prompt of every picture, and they are not known; give a folder "
            "of arra generate, or one with metadata.jsonl"
        )
    if out.exists():
        raise ArraError(f"{out}: exists already; name another folder or delete it")
    names = [f"{number:06d}.png" for number in range(len(pictures))]
    with writing(out):
        (out / PICTURES).mkdir(parents=True)
    for first in range(0, len(names), PICTURES_AT_A_TIME):
        part = range(first, min(first + PICTURES_AT_A_TIME, len(names)))
        jobs = [(out / PICTURES / names[row], image) for row, image in zip(part, pictures.read(part), strict=True)]
        list(in_threads(_save, jobs))
        progress("exporting", part.stop, len(names))
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((prompt, prompt, name, name) for prompt, name in zip(prompts, names, strict=True))
    atomic_write(out / TABLE, table.getvalue())
    return ExportedSet(out, len(names), len(set(prompts)))


def _save(job: tuple[Path, UInt8[np.ndarray, "H W 3"]]) -> None:
    path, image = job
    with atomic_file(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG")
