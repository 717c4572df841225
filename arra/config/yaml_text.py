"""YAML as recipes have it: read safely and strictly, written so that it reads back the same.

file --read_text--> text --parse_yaml--> tree of settings --dump_yaml--> text
"""

import re
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from arra.config.explaining import Tree, show
from arra.errors import ArraError

# YAML 1.1 wants a dot and a sign in 1e-4; people, JSON and YAML 1.2 do not.
_FLOAT = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class _Strict(yaml.constructor.SafeConstructor):
    """Refuses a key written twice and a key that is no text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise _Refused(f"line {line}: expected a name as key, found {key!r}; put it in quotes")
            if key in seen:
                raise _Refused(f"line {line}: '{key}' is written twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Loader(_Strict, yaml.SafeLoader):
    """Safe YAML, with messages that say what was expected."""


class _FastLoader(_Strict, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same by libyaml, where PyYAML has it."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: text that looks like a number is quoted, shared lists are written out."""

    def ignore_aliases(self, data: object) -> bool:
        return True


for _class in (_Loader, _FastLoader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class _Refused(yaml.YAMLError):
    pass


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ArraError: it is not UTF-8, or not readable.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ArraError(f"{path}: expected YAML text in UTF-8, found something else") from None
    except PermissionError:
        raise ArraError(f"{path}: not readable for this user; change its permissions") from None


def load_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; `source` names it in errors.

    Raises:
        ArraError: it is no YAML, has a key twice, or a key that is no text.
    """
    with suppress(yaml.YAMLError, ValueError):
        return yaml.load(text, Loader=_FastLoader)
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ArraError(f"{source}: line {line}: not YAML: {error.problem}") from None
    except ValueError as error:  # a date that there is not: 2024-30-01
        raise ArraError(f"{source}: {error}; put text in quotes") from None
    except yaml.YAMLError as error:
        raise ArraError(f"{source}: {' '.join(str(error).split())}") from None


def parse_yaml(text: str, source: str) -> Tree:
    """The mapping of a YAML text; `source` names it in errors.

    Raises:
        ArraError: as `load_yaml`, or it is no mapping.
    """
    data = load_yaml(text, source)
    if not isinstance(data, dict):
        raise ArraError(f"{source}: expected sections such as 'train:', found {show(data)}")
    return data


def dump_yaml(data: Tree) -> str:
    """YAML that `load_yaml` reads back to equal values, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
