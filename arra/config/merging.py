"""One tree of settings laid over another: bases, rows, `--set`."""

from copy import deepcopy
from typing import Any

from arra.config.explaining import KeyPath, Tree
from arra.config.yaml_text import load_yaml
from arra.errors import ArraError


def merge(base: Tree, difference: Tree) -> Tree:
    """`base` with `difference` laid over it: mappings merge key by key, all else (`null` too) replaces."""
    merged = deepcopy(base)
    for key, value in difference.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = merge(old, value) if both else deepcopy(value)  # type: ignore[arg-type]
    return merged


def assign(data: Tree, override: str) -> KeyPath:
    """The key of `a.b=c`, after setting it in `data`; validation refuses keys that the settings do not have."""
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise ArraError(f"--set {override}: expected section.key=value, as in --set train.steps=100")
    if parts[0] == "rows":
        raise ArraError(f"--set {override}: rows are chosen, not set; use --row NAME and set the key itself")
    value = load_yaml(text, f"--set {dotted}")
    for depth, part in enumerate(parts[:-1]):
        old = data.get(part)
        if not isinstance(old, dict):  # an encoder may be written as its name alone
            data[part] = {"name": old} if isinstance(old, str) and depth and parts[0] == "encoder" else {}
        data = data[part]
    data[parts[-1]] = value
    return tuple(parts)


def holds(tree: Any, key: KeyPath) -> bool:
    """Whether a tree says something of a key, or of all that it lies in."""
    for part in key:
        if not isinstance(tree, dict):
            return True
        if part not in tree:
            return False
        tree = tree[part]
    return True


def is_beside(key: KeyPath, assigned: KeyPath) -> bool:
    """Whether one of two keys is the other or lies inside it."""
    return all(a == b for a, b in zip(key, assigned, strict=False))
