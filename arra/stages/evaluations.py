"""`arra evaluate`: a run on what it was trained to do, or a set of pictures against another one."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.markup import escape

from arra.errors import ArraError
from arra.stages.evaluate import evaluate, results_table
from arra.stages.evaluate_set import evaluate_set
from arra.stages.process import Progress, silent
from arra.stages.set_options import SetOptions
from arra.stages.set_table import set_table


def evaluate_any(subject: Path, options: SetOptions, *, progress: Progress = silent) -> Sequence[RenderableType]:
    """What is shown of an evaluation: of a run what held-out pictures say; of all else, or where options ask, a set's.

    Raises:
        ArraError: as `evaluate` and `evaluate_set`.
    """
    if (subject / "recipe.yaml").is_file() and not options.are_asked_for:
        if unused := options.of_sets_alone:
            raise ArraError(f"{unused}: a run alone is measured as its recipe says; name a --protocol or --space too")
        evaluation = evaluate(
            subject,
            threads=options.threads,
            tokenizer_weights=options.tokenizer_weights,
            device=options.device,
            progress=progress,
        )
        return [results_table(evaluation)]
    done = evaluate_set(subject, options, progress=progress)
    return [set_table(done.evaluation), escape(f"card: {done.page}")]
