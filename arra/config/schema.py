"""The JSON schema of recipe files, for editors."""

import json
from pathlib import Path
from typing import Any

from arra.config.explaining import Tree
from arra.config.sections import Recipe
from arra.evaluate.paper import TableRow, TableSection
from arra.runs import atomic_write
from arra.settings import Settings


def json_schema(model: type[Settings] = Recipe) -> Tree:
    """The JSON schema of a recipe file, rows included, for editors."""
    schema = model.model_json_schema()
    change = _as_change({key: value for key, value in schema.items() if key != "$defs"})
    definitions = schema.setdefault("$defs", {})
    definitions |= {f"{name}Change": _as_change(part) for name, part in list(definitions.items())}
    definitions["RecipeChange"] = change
    if model is Recipe:  # what a file may say beside settings
        for facts in (TableSection, TableRow):
            of_paper = facts.model_json_schema()
            definitions |= of_paper.pop("$defs", {})
            definitions[facts.__name__] = of_paper
        change["properties"] = {**change["properties"], **definitions["TableRow"]["properties"]}
        schema["properties"]["table"] = {"$ref": "#/$defs/TableSection"}
        schema["properties"]["base"] = {"type": "string", "description": "Recipe whose settings these are laid over."}
        schema["required"] = [name for name in schema.get("required", []) if name != "train"]  # the base may have it
    schema["properties"]["rows"] = {
        "type": "object",
        "description": "Named variants: what differs from the settings above. `null` removes a section.",
        "additionalProperties": {"anyOf": [{"$ref": "#/$defs/RecipeChange"}, {"type": "null"}]},
    }
    return schema


def write_schema(path: Path | str, model: type[Settings] = Recipe) -> None:
    """Nothing; `path` holds the schema that the first line of a recipe points editors to."""
    atomic_write(path, json.dumps(json_schema(model), indent=2) + "\n")


def _as_change(node: Any) -> Any:
    """A definition for a row: nothing is required, sections are changes themselves and may be null."""
    if isinstance(node, list):
        return [_as_change(part) for part in node]
    if not isinstance(node, dict):
        return node
    changed: Tree = {}
    for key, value in node.items():
        if key == "$ref":
            changed["anyOf"] = [{"$ref": f"{value}Change"}, {"type": "null"}]
        elif not (key == "discriminator" or (key == "required" and isinstance(value, list))):
            changed[key] = _as_change(value)
    return changed
