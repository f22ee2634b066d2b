"""Presets: strict YAML into dataclasses, layer over layer, with errors that name file and key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from launch.presets import CONFIGS, Layer, build, find, overrides, read
from parallel.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    tp: int = 1
    kind: Literal["a", "b"] = "a"
    share: float = 0.5
    limit: int | None = 7
    names: tuple[str, ...] = ()
    on: bool = False


@dataclass(frozen=True, kw_only=True)
class Outer:
    model: str
    inner: Inner = field(default_factory=Inner)


def layer(**values: object) -> Layer:
    return Layer("there.yaml", values)


def test_later_layers_win_key_by_key() -> None:
    built = build(Outer, [layer(model="m", inner={"tp": 2, "share": 1}), layer(inner={"tp": 3, "limit": None})])
    assert built == Outer(model="m", inner=Inner(tp=3, share=1.0, limit=None))
    assert isinstance(built.inner.share, float)


def test_lists_become_tuples() -> None:
    assert build(Outer, [layer(model="m", inner={"names": ["x", "y"]})]).inner.names == ("x", "y")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"inner": {"tpp": 2}},
            r"there.yaml.inner: unknown \['tpp'\]; Inner accepts \['kind', 'limit', 'names', 'on', 'share', 'tp'\]",
        ),
        ({"inner": {"tp": "2"}}, r"there.yaml.inner.tp is '2' \(str\); it must be a whole number"),
        ({"inner": {"tp": True}}, r"there.yaml.inner.tp is True \(bool\); it must be a whole number"),
        ({"inner": {"tp": 2.0}}, r"there.yaml.inner.tp is 2.0"),
        ({"inner": {"tp": None}}, r"there.yaml.inner.tp is empty; it must be a whole number"),
        ({"inner": {"limit": "x"}}, r"there.yaml.inner.limit is 'x'"),
        ({"inner": {"on": 1}}, r"there.yaml.inner.on is 1 \(int\); it must be true or false"),
        ({"inner": {"kind": "c"}}, r"there.yaml.inner.kind is 'c'; choose one of \['a', 'b'\]"),
        ({"inner": {"names": ["x", 1]}}, r"there.yaml.inner.names\[1\] is 1"),
        ({"inner": 5}, r"there.yaml.inner is 5 \(int\); it must be a mapping"),
        ({}, r"Outer needs \['model'\]; no preset or option gives them"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(Outer, [layer(**values)])


def test_dotted_overrides_are_read_as_yaml() -> None:
    built = build(
        Outer, [overrides(["model=m", "inner.tp=4", "inner.limit=null", "inner.on=true", "inner.names=[p, q]"])]
    )
    assert built == Outer(model="m", inner=Inner(tp=4, limit=None, on=True, names=("p", "q")))


@pytest.mark.parametrize("setting", ["inner.tp", "inner..tp=1", "=3", "--tp=2", "inner.tp=[1"])
def test_a_malformed_override_is_refused_with_an_example(setting: str) -> None:
    with pytest.raises(ConfigError, match="not an override; write name.name=value|not valid YAML"):
        overrides([setting])


def test_an_override_below_a_plain_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="inner was given a value of its own before"):
        overrides(["inner=3", "inner.tp=2"])


def test_a_key_given_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("model: a\nmodel: b\n")
    with pytest.raises(ConfigError, match=r"twice.yaml is not valid YAML: given twice: \['model'\]"):
        read(file)


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [\n", "\t"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="odd.yaml (holds|is not valid YAML)"):
        read(file)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'smal' in configs/engine; choose one of \['latency', 'small'"):
        find("smal", "engine")


def test_a_path_that_is_no_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no preset file at \./nothing\.yaml"):
        find("./nothing.yaml", "engine")


def test_a_shipped_preset_is_named_by_its_place_in_the_repository() -> None:
    assert read(CONFIGS / "engine" / "small.yaml").where == "configs/engine/small.yaml"


@dataclass(frozen=True, kw_only=True)
class Loose:
    inner: Inner | None = None
    names: tuple[str, ...] | str | None = None


def test_an_optional_part_is_made_where_it_is_given_and_a_list_or_a_text_is_taken() -> None:
    assert build(Loose, [layer(names="all")]) == Loose(names="all")
    assert build(Loose, [layer(names=["a", "b"], inner={"tp": 3})]) == Loose(names=("a", "b"), inner=Inner(tp=3))
    assert build(Loose, [layer(inner={"tp": 3}), layer(inner=None)]) == Loose()
    with pytest.raises(ConfigError, match=r"there.yaml.names is 5"):
        build(Loose, [layer(names=5)])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E5", 1e5), ("-1.5e+3", -1500.0), (".5", 0.5), ("5.", 5.0), ("010", 10), ("0x10", 16),
        ("no", "no"), ("on", "on"), ("2024-01-31", "2024-01-31"), ("1:30", "1:30"), ("1_000", "1_000"),
        ("true", True), ("", None), ("null", None), ("~", None), ("[1e-3, no]", [0.001, "no"]),
    ],
)  # fmt: skip
def test_a_preset_is_read_as_yaml_1_2(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "preset.yaml"
    path.write_text(f"given: {text}\n")
    read_value = read(path).values["given"]
    assert read_value == value and type(read_value) is type(value)


def test_what_is_written_for_a_text_stays_as_it_is_written() -> None:
    assert build(Outer, [overrides(["model=2024"])]).model == "2024"
    assert build(Outer, [overrides(["model=1e3"])]).model == "1e3"
    assert build(Outer, [overrides(["model=true", "inner.share=1e-1", "inner.limit=3"])]) == Outer(
        model="true", inner=Inner(share=0.1, limit=3)
    )


def test_nan_is_no_number_for_a_setting() -> None:
    with pytest.raises(ConfigError, match=r"command line.inner.share is not a number \(nan\)"):
        build(Outer, [overrides(["model=m", "inner.share=.nan"])])
