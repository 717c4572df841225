"""Recipes: one YAML file in, validated settings out. Composes the rooms' settings; no room imports this.

    recipes/demo.yaml --row--> base with the row's difference --set--> pydantic --> Recipe --> runs/NAME/recipe.yaml

A mistake in a recipe is told in one line: the file, the dotted key, what was expected, what was found.
"""

from arra.config.files import (
    RecipeFile,
    dump_recipe,
    load_recipe,
    parse_recipe,
    read_recipe_file,
    recipe_of_row,
    row_names,
)
from arra.config.folders import built_in_recipes, find_recipe, recipes_folder
from arra.config.schema import json_schema, write_schema
from arra.config.sections import (
    DataSection,
    EncoderSection,
    LanguageSection,
    ModelSection,
    Recipe,
    TextEncoderSection,
    TextSection,
    TokenizerSection,
    check_template,
)

__all__ = [
    "DataSection",
    "EncoderSection",
    "LanguageSection",
    "ModelSection",
    "Recipe",
    "RecipeFile",
    "TextEncoderSection",
    "TextSection",
    "TokenizerSection",
    "built_in_recipes",
    "check_template",
    "dump_recipe",
    "find_recipe",
    "json_schema",
    "load_recipe",
    "parse_recipe",
    "read_recipe_file",
    "recipe_of_row",
    "recipes_folder",
    "row_names",
    "write_schema",
]
