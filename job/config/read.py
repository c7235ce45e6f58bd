"""From a YAML file and ``--set`` overrides to a `Config`, with errors that name file, line, key and the way out."""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from job import errors
from job.config import urls
from job.config.data import Source
from job.config.identity import BEGAN
from job.config.schema import Config
from job.config.section import Section

Tree = dict[str, Any]
Kind = TypeVar("Kind", bound=Section)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where in the source each key stands, for error messages."""

    source: str
    lines: Mapping[str, int]

    def of(self, key: str) -> str:
        """``file:line`` of the dotted `key`, or of the nearest section that is there."""
        while key and key not in self.lines:
            key = key.rpartition(".")[0]
        return f"{self.source}:{self.lines[key]}" if key in self.lines else self.source


class _Loader(yaml.SafeLoader):
    """YAML in which ``2e-4`` is a number; PyYAML's YAML 1.1 wants ``2.0e-4`` and makes it a string otherwise."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read, override and check the config at `path`; `overrides` are ``dotted.key=value`` strings.

    Raises `errors.ConfigError` with one line for each thing that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise errors.ConfigError(f"{path}: cannot be read ({e}); give the path of a YAML file") from e
    return parse(text, str(path), overrides)


def parse(text: str, source: str, overrides: Iterable[str] = ()) -> Config:
    """The config that `text` from `source` is; raises as `read` does."""
    tree, places = _parse(text, source)
    return check(overridden(tree, overrides, places), places)


def overridden(tree: Tree, overrides: Iterable[str], places: Places) -> Tree:
    """`tree` with ``dotted.key=value`` strings applied, and paths made URLs."""
    for override in overrides:
        _apply(tree, override)
    _refuse_interpolation(tree, "", places)
    return urls.all_absolute(tree)


def check(tree: Tree, places: Places) -> Config:
    """Turn plain data into a `Config`; raises `errors.ConfigError` that says where each fault stands."""
    return made(tree, places, Config)


def made(tree: Tree, places: Places, kind: type[Kind]) -> Kind:
    """Turn plain data into a `kind` of config; raises as `check` does."""
    try:
        # By way of JSON, because pydantic's strict mode takes JSON arrays as tuples but not Python lists.
        return kind.model_validate_json(json.dumps(tree, default=str))
    except pydantic.ValidationError as e:
        raise errors.ConfigError("\n".join(_explain(fault, places) for fault in _plain(e))) from e


def _parse(text: str, source: str) -> tuple[Tree, Places]:
    try:
        root = yaml.compose(text, Loader=_Loader)
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as e:
        raise errors.ConfigError(f"{source}: not valid YAML: {e}") from e
    if not isinstance(root, yaml.MappingNode):
        raise errors.ConfigError(f"{source}: must be a mapping with the sections {', '.join(Config.model_fields)}")
    try:
        json.dumps(tree, default=str)
    except (TypeError, ValueError) as e:
        raise errors.ConfigError(f"{source}: holds something other than plain keys and values: {e}") from e
    places = Places(source, dict(_lines(root, "", source)))
    tree.pop(BEGAN, None)  # of a config that was kept under a run URL
    return {key: {} if value is None else value for key, value in tree.items()}, places  # a section of comments only


def _lines(node: yaml.MappingNode, prefix: str, source: str) -> Iterable[tuple[str, int]]:
    seen: set[str] = set()
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in seen:
            raise errors.ConfigError(
                f"{source}:{line}: {name} is given twice; YAML would silently use the last: delete one"
            )
        seen.add(name)
        yield name, line
        if isinstance(value, yaml.MappingNode):
            yield from _lines(value, f"{name}.", source)


def _apply(tree: Tree, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise errors.ConfigError(
            f"--set {override}: must be dotted.key=value, for example --set train.learning_rate=1e-4"
        )
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise errors.ConfigError(f"--set {override}: {section} is a value, not a section")
    try:
        tree[last] = yaml.load(value, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.YAMLError as e:
        raise errors.ConfigError(f"--set {override}: the value is not valid YAML: {e}") from e


def _refuse_interpolation(value: object, key: str, places: Places) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_interpolation(item, f"{key}.{name}".lstrip("."), places)
    elif isinstance(value, list):
        for item in value:
            _refuse_interpolation(item, key, places)
    elif isinstance(value, str) and "${" in value:
        raise errors.ConfigError(
            f"{places.of(key)}: {key}: {value!r} is not expanded: configs take no variables. Use --set "
            f"{key}=… to change a value; "
            "credentials come from the standard AWS and Hugging Face chain"
        )


def _plain(error: pydantic.ValidationError) -> list[Any]:
    """One fault per key: a union reports each of its arms, of which the reader needs only what is allowed."""
    faults: dict[str, Any] = {}
    for fault in error.errors(include_url=False):
        key = _key(fault["loc"])
        if key in faults:
            faults[key] = {**faults[key], "msg": f"{faults[key]['msg']}; or: {fault['msg']}", "type": "union"}
        else:
            faults[key] = dict(fault)
    return [fault for key, fault in faults.items() if not any(other.startswith(f"{key}.") for other in faults)]


def _key(location: tuple[int | str, ...]) -> str:
    model: Any = Config
    parts: list[str] = []
    for part in location:
        if isinstance(part, int):
            parts.append(str(part))
            continue
        fields = getattr(model, "model_fields", None)
        if fields is None:  # inside a union pydantic adds the name of each arm to the location
            if part != "source":
                break
            model = Source
            continue
        parts.append(part)
        model = fields[part].annotation if part in fields else None
    return ".".join(parts)


def _explain(fault: Mapping[str, Any], places: Places) -> str:
    key, seen = _key(fault["loc"]), fault.get("input")
    where = f"{places.of(key)}: {key or 'config'}"
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key. {_nearest(key)}"
    if fault["type"] == "missing":
        return f"{where}: is missing and has no default: add it"
    message = fault["msg"].removeprefix("Value error, ")
    given = "" if isinstance(seen, dict) else f" was given {seen!r};"
    return f"{where}:{given} {message[0].lower()}{message[1:]}"


def _nearest(key: str) -> str:
    *sections, last = key.split(".")
    siblings = _fields(sections)
    close = difflib.get_close_matches(last, siblings, n=1)
    elsewhere = [name for name in all_keys() if name.rpartition(".")[2] == last]
    prefix = "".join(f"{s}." for s in sections)
    if close:
        hint = f"Did you mean {prefix}{close[0]}? "
    elif elsewhere:
        hint = f"Did you mean {elsewhere[0]}? "
    else:
        hint = ""
    return f"{hint}Allowed here: {', '.join(siblings)}"


def _fields(sections: Iterable[str]) -> list[str]:
    model: Any = Config
    for section in sections:
        if section.isdecimal():  # one of a list of sources
            model = Source
            continue
        field = getattr(model, "model_fields", {}).get(section)
        model = field.annotation if field else None
    return list(getattr(model, "model_fields", {}))


def all_keys() -> list[str]:
    """Every dotted key that a config may have."""
    return [f"{section}.{key}" for section in Config.model_fields for key in _fields([section])]
