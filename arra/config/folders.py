"""Where recipes lie: built in, or in files of the user's."""

import re
from pathlib import Path
from typing import Any

from arra.config.explaining import did_you_mean, show
from arra.errors import ArraError


def recipes_folder() -> Path:
    """The built-in recipes: `recipes/` of a clone, `arra/recipes/` of an installed wheel."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def built_in_recipes() -> list[Path]:
    """The files of all built-in recipes, in the order of their names."""
    return sorted(recipes_folder().glob("*.yaml"))


def find_recipe(path: Path | str) -> Path:
    """The file at `path`, else the built-in recipe of that name (`demo`, `demo.yaml`, `recipes/demo.yaml`)."""
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise ArraError(f"{path}: is a folder, expected a recipe file, as in recipes/demo.yaml")
    built_in = {file.stem: file for file in built_in_recipes()}
    if path.stem in built_in and path.suffix in ("", ".yaml") and str(path.parent) in (".", "recipes"):
        return built_in[path.stem]
    raise ArraError(
        f"{path}: no such file{did_you_mean(path.stem, list(built_in))}; built-in recipes: {', '.join(built_in)}"
    )


def named_recipe(name: Any, source: str, key: str) -> Path:
    """The file of a recipe that the one at `source` names: beside it, else built in; never one elsewhere.

    Raises:
        ArraError: there is none of that name, or it is a path.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+(\.yaml)?", name):
        raise ArraError(
            f"{source}: {key}: expected the name of a recipe, built in or beside this file, found {show(name)}"
        )
    stem = name.removesuffix(".yaml")
    beside = [Path(source).parent / f"{stem}.yaml"] if Path(source).is_file() else []
    for path in (*beside, recipes_folder() / f"{stem}.yaml"):
        if path.is_file():
            return path
    near = did_you_mean(stem, [path.stem for path in built_in_recipes()])
    raise ArraError(f"{source}: {key}: no recipe '{name}', built in or beside this file{near}")
