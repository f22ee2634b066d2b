"""From YAML files and dotted overrides to dataclasses, strictly: whatever is wrong is an error that names its place.

    layers = [read(path), overrides(["engine.max_sequences=8"])]
    config = build(ServeConfig, layers)          # later layers win, key by key

A preset is a partial mapping of the same shape as the dataclass. No defaults live here and nothing is guessed. Values
are read as YAML 1.2 reads them (core schema): 1e-3 is a number, `no` and 2024-01-31 are text.
"""

from __future__ import annotations

import re
import types
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from parallel.errors import ConfigError

_INSTALLED = Path(__file__).resolve().parent / "configs"
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "configs"
"""Beside this package where it is installed from a wheel, at the root of a checkout."""


@dataclass(frozen=True)
class Layer:
    """Some settings and where they came from."""

    where: str
    values: Mapping[str, Any]


def read(path: Path) -> Layer:
    """The settings of a YAML file."""
    where = _shown(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())[:200]}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply to hold settings") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} holds {_kind(values)}; a preset is a mapping of settings")
    return Layer(where, values)


def find(name: str, folder: str) -> Path:
    """A preset's file: a path as it is, a name from configs/<folder>/."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if not Path(name).is_file():
            raise ConfigError(f"no preset file at {name}")
        return Path(name)
    known = sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))
    if not known:
        raise ConfigError(
            f"no preset {name!r}: names come from a checkout's configs/{folder}; give a path to a .yaml file"
        )
    if name not in known:
        raise ConfigError(
            f"no preset {name!r} in configs/{folder}; choose one of {known} or give a path to a .yaml file"
        )
    return CONFIGS / folder / f"{name}.yaml"


@dataclass(frozen=True)
class _Written:
    """A scalar of the command line, where nobody quotes: `out=2024` names a folder, `steps=2024` counts."""

    text: str
    value: bool | int | float

    def __repr__(self) -> str:
        return repr(self.value)


def overrides(settings: Sequence[str]) -> Layer:
    """`engine.max_sequences=8` and the like, values written as in YAML."""
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"{setting!r} is not an override; write name.name=value, as in engine.max_sequences=8")
        try:
            value = yaml.load(text, Loader=_StrictLoader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{setting[:100]!r}: the value is not valid YAML: {' '.join(str(error).split())[:200]}"
            ) from error
        written = _Written(text, value) if isinstance(value, bool | int | float) else value
        _put(values, name.split("."), written, setting)
    return Layer("command line", values)


def build(kind: type[Any], layers: Sequence[Layer]) -> Any:
    """A dataclass from its layers; each is checked on its own, so that an error names the one it is in."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, _checked(kind, layer.values, layer.where))
    return _make(kind, merged)


def _checked(kind: type[Any], values: Any, where: str) -> dict[str, Any]:
    """The values with their types checked against the dataclass, nested ones too."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is {_kind(values)}; it must be a mapping with some of {_names(kind)}")
    unknown = sorted(str(name) for name in values if name not in _names(kind))
    if unknown:
        raise ConfigError(f"{where}: unknown {unknown}; {kind.__name__} accepts {_names(kind)}")
    hints = get_type_hints(kind)
    return {name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()}


def _value(hint: Any, value: Any, where: str) -> Any:
    """One value of one type; whole numbers do where a float is wanted, nothing else is converted."""
    if isinstance(value, _Written):
        text = str in (hint, *get_args(hint)) and type(value.value) not in get_args(hint)
        return _value(hint, value.text.strip() if text else value.value, where)
    if is_dataclass(hint):
        return _checked(hint, value, where)  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [option for option in arguments if option is not type(None)]
        return _value(next((o for o in options if isinstance(o, type) and type(value) is o), options[0]), value, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} is {value!r}; choose one of {list(arguments)}")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and value != value:
        raise ConfigError(f"{where} is not a number (nan); give one")
    if not isinstance(hint, type) or not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} is {_kind(value)}; it must be {_WORDS.get(hint, hint)}")
    return value


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        nested = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if nested else value
    return merged


def _make(kind: type[Any], values: Mapping[str, Any], path: str = "") -> Any:
    """`path` is the section's, with a dot behind it: what a section's own rules say of a field gets its whole name."""
    hints = get_type_hints(kind)
    missing = [
        f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING and f.name not in values
    ]
    if missing:
        names = [f"{path}{name}" for name in missing]
        raise ConfigError(f"{kind.__name__} needs {names}; no preset or option gives them: add {names[0]}=...")
    made = dict(values)
    for name, value in values.items():
        inner = next((hint for hint in (hints[name], *get_args(hints[name])) if is_dataclass(hint)), None)
        if inner is not None and isinstance(value, Mapping):  # not where an optional one is left out
            made[name] = _make(inner, value, f"{path}{name}.")  # type: ignore[arg-type]
    try:
        return kind(**made)
    except ConfigError as error:
        raise ConfigError(_named(str(error), kind, path)) from error


def _named(message: str, kind: type[Any], path: str) -> str:
    """A section's message, in which the name it begins with is one that can be set."""
    if not path or re.match(r"[a-z_]+\.[a-z]", message):
        return message
    return f"{path}{message}" if message.split()[0].rstrip(",:") in _names(kind) else f"{path[:-1]}: {message}"


def _put(values: dict[str, Any], path: Sequence[str], value: Any, setting: str) -> None:
    *parents, last = path
    for name in parents:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{setting!r}: {name} was given a value of its own before")
    values[last] = value


def _names(kind: type[Any]) -> list[str]:
    return sorted(f.name for f in fields(kind))


_WORDS: Mapping[Any, str] = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false",
    tuple[str, ...]: "a list of texts, as in [a, b]", tuple[int, ...]: "a list of whole numbers, as in [1, 2]",
}  # fmt: skip


def _kind(value: Any) -> str:
    return "empty" if value is None else f"{value!r} ({type(value).__name__})"


def _shown(path: Path) -> str:
    """A shipped preset by its path in the repository, any other as it was given."""
    return str(path.relative_to(CONFIGS.parent)) if path.is_relative_to(CONFIGS) else str(path)


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2's core schema, where a key given twice is an error, not the last one's silent victory."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (as its base has it)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            names = [self.construct_object(key) for key, _ in node.value]
            twice = sorted({str(name) for name in names if names.count(name) > 1})
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {twice}", node.start_mark)
        return mapping

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _resolve(tag: str, pattern: str, first: str) -> None:
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))


_resolve("null", "~|null|Null|NULL|", "~nN")
_StrictLoader.yaml_implicit_resolvers[""] = [("tag:yaml.org,2002:null", re.compile("^$"))]
_resolve("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_resolve("int", "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789")
_resolve(
    "float",
    r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "-+.0123456789",
)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_int)
