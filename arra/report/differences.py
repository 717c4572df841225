"""What differs between the recipes of several runs, setting by setting.

Place in the pipeline: reads resolved recipes as runs keep them; the pages of several runs show what comes back.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

NAMES = frozenset({"name", "row", "train.seed"})
"""Say which run it is, and nothing about it."""
SECTION = "…"
"""Value of a setting that has settings of its own."""


def recipe_differences(recipes: Mapping[str, str]) -> list[tuple[str, dict[str, str]]]:
    """Settings that are not the same in all recipes (YAML, by what each is called), and the value of each.

    A recipe without a section (`align: null`) has that one difference, not one for each setting that others have there:
    these are compared among those others. Text that is no recipe is left out.
    """
    flat = {label: settings for label, text in recipes.items() if (settings := dict(_flat(_loaded(text))))}
    found = []
    for key in dict.fromkeys(key for settings in flat.values() for key in settings):
        section = key.rpartition(".")[0]
        asked = [settings for settings in flat.values() if settings.get(section, SECTION) == SECTION]
        if key not in NAMES and len({settings.get(key) for settings in asked}) > 1:
            found.append((key, {label: settings.get(key, "") for label, settings in flat.items()}))
    return found


def _loaded(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every setting by its dotted path, and sections as such."""
    if not isinstance(tree, Mapping) or (path and not tree):
        if path:
            yield path, _told(tree)
        return
    if path:
        yield path, SECTION
    for key, value in tree.items():
        yield from _flat(value, f"{path}.{key}" if path else str(key))


def _told(value: Any) -> str:
    """As recipes have it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
