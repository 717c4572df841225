"""How a prompt becomes the prefix of a sequence: training, sampling and evaluation write it with this code."""

from collections.abc import Sequence

from arra.errors import ArraError

PAD = 0
BOI = 1


def text_prefix(ids: Sequence[int], prefix_length: int) -> tuple[list[int], list[bool]]:
    """Tokens and mask (True = real) of a prefix: padding on the left, then the ids, then the begin-of-image token.

    Raises: ArraError when the ids and the begin-of-image token do not fit.
    """
    if len(ids) + 1 > prefix_length:
        raise ArraError(
            f"prompt: {len(ids)} tokens and the begin-of-image token do not fit the {prefix_length} prefix positions; "
            "shorten the prompt or train with a longer prefix"
        )
    padding = prefix_length - len(ids) - 1
    return [PAD] * padding + [*ids, BOI], [False] * padding + [True] * (len(ids) + 1)
