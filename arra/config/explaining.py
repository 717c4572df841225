"""What is wrong with settings, in one line: the key in the file, what was expected, what was found, what is near."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from arra.settings import Settings

Tree = dict[str, Any]
"""Settings as YAML has them."""
KeyPath = tuple[str | int, ...]
"""A key and the sections that it lies in."""


def problems_of(error: ValidationError) -> list[ErrorDetails]:
    """What pydantic found; misspelt keys first, which make the right ones missing."""
    return sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")


def explain(problem: ErrorDetails, data: Tree, model: type[Settings]) -> tuple[KeyPath, str]:
    """The key in the file and a line in words for one problem that pydantic found."""
    kind, context = problem["type"], problem.get("ctx", {})
    schema = model.model_json_schema()
    key = _key_in_file(problem["loc"], data, keep_last=kind in ("missing", "extra_forbidden"))
    if kind == "extra_forbidden":
        names = list(dict.fromkeys(name for node in _nodes(schema, key[:-1]) for name in node.get("properties", {})))
        near = did_you_mean(str(key[-1]), names)
        return key, f"unknown key{near or '; expected one of: ' + ', '.join(names)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        key = (*key, context["discriminator"].strip("'"))
        tags = [tag for node in _nodes(schema, key[:-1]) for tag in node.get("discriminator", {}).get("mapping", {})]
        return key, _expected(_join(f"'{tag}'" for tag in tags), context.get("tag", ...), tags)
    if kind in ("value_error", "assertion_error"):
        return key, " ".join(str(context["error"]).split())
    nodes = _nodes(schema, key)
    words = _join(dict.fromkeys(_describe(node) for node in nodes))
    if not words or "pattern" in kind:
        words = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    choices = [choice for node in nodes for choice in (*node.get("enum", ()), node.get("const")) if choice is not None]
    return key, _expected(words, ... if kind == "missing" else problem["input"], choices)


def _expected(words: str, found: Any, choices: Sequence[object]) -> str:
    if found is ...:
        return f"missing; expected {words}"
    return f"expected {words}, found {show(found)}{did_you_mean(found, [str(choice) for choice in choices])}"


def _key_in_file(location: KeyPath, data: Any, keep_last: bool) -> KeyPath:
    """`location` without the names of union members, which pydantic puts in and no file has."""
    key: list[str | int] = []
    for index, part in enumerate(location):
        if part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data)):
            data = data[part]
        elif not (keep_last and index == len(location) - 1):
            continue
        key.append(part)
    return tuple(key)


def _nodes(schema: Tree, key: KeyPath) -> list[Tree]:
    """The parts of a JSON schema that may describe `key`; several where settings are a union."""
    nodes = list(_branches(schema, schema))
    for part in key:
        below: list[Tree] = []
        for node in nodes:
            properties, items = node.get("properties", {}), node.get("prefixItems", [])
            if part in properties:
                below.append(properties[part])
            elif isinstance(part, int) and part < len(items):
                below.append(items[part])
            else:
                rest = node.get("items" if isinstance(part, int) else "additionalProperties")
                below += [rest] if isinstance(rest, dict) else []
        nodes = [branch for node in below for branch in _branches(node, schema)]
    return nodes


def _branches(node: Tree, schema: Tree) -> Iterator[Tree]:
    if "$ref" in node:
        yield from _branches(schema["$defs"][node["$ref"].rpartition("/")[2]], schema)
        return
    unions = [part for union in ("anyOf", "oneOf", "allOf") for part in node.get(union, ())]
    if not unions or "discriminator" in node:
        yield node
    for part in unions:
        yield from _branches(part, schema)


_NOUNS = {
    "integer": "an integer",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "array": "a list",
    "object": "a section of keys",
}
_LIMITS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def _describe(node: Tree) -> str:
    """What a JSON schema node accepts, in words: `an integer > 0`."""
    if "enum" in node:
        return _join(_quote(choice) for choice in node["enum"])
    if "const" in node:
        return _quote(node["const"])
    noun = _NOUNS.get(node.get("type", ""), "")
    limits = " and ".join(f"{sign} {node[name]}" for name, sign in _LIMITS.items() if name in node)
    if noun == "a list":
        least, most = node.get("minItems"), node.get("maxItems")
        if least is not None or most is not None:
            limits = f"of {least}" if least == most else f"of {least or 0} to {most}" if most else f"of {least} or more"
    elif noun == "text" and node.get("minLength"):
        limits = "that is not empty" if node["minLength"] == 1 else f"of {node['minLength']} or more characters"
    elif noun == "text" and node.get("examples"):
        limits = f"as in {_quote(node['examples'][0])}"
    return f"{noun} {limits}".strip()


def _quote(choice: Any) -> str:
    return {None: "null", True: "true", False: "false"}.get(choice) or (
        f"'{choice}'" if isinstance(choice, str) else str(choice)
    )


def _join(words: Iterable[str]) -> str:
    listed = [word for word in words if word]
    return " or ".join([", ".join(listed[:-1]), listed[-1]] if len(listed) > 1 else listed)


def show(value: Any) -> str:
    """A value as a message has it, shortened."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(word: object, names: list[str]) -> str:
    """What to append to a message about a word that is none of the names: the nearest one, or nothing."""
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6) if isinstance(word, str) else []
    return f"; did you mean '{near[0]}'?" if near else ""
