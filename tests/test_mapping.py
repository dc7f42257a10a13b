"""Dataclasses and plain values: strict for what people write, lenient for what another version wrote."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from ryot.errors import ConfigError
from ryot.mapping import build_from_mapping, formerly, read_mapping, to_mapping


class Colour(enum.StrEnum):
    RED = "red"


@dataclass(frozen=True, kw_only=True)
class Part:
    size: int
    points: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Whole:
    name: str = field(metadata=formerly("title", values={"Old": "new"}))
    parts: tuple[Part, ...] = ()
    by_key: Mapping[str, Part] = field(default_factory=dict)
    colour: Colour = Colour.RED
    one: Part | None = None


WHOLE = Whole(name="x", parts=(Part(size=1, points=((1.0, 2.0),)),), by_key={"k": Part(size=2)}, one=Part(size=3))


def test_what_was_written_as_json_is_read_back_equal_at_any_depth() -> None:
    found = read_mapping(Whole, json.loads(json.dumps(to_mapping(WHOLE, keep_none=True))))
    assert found == WHOLE
    assert type(found.colour) is Colour and type(found.parts[0].points[0]) is tuple


def test_former_names_and_values_are_taken_and_unknown_keys_passed_over() -> None:
    assert read_mapping(Whole, {"title": "Old", "of a later version": 1}) == Whole(name="new")
    assert build_from_mapping(Whole, {"title": "y"}, "file").name == "y"


def test_what_people_write_is_refused_where_it_is_wrong() -> None:
    with pytest.raises(ConfigError, match="file: key: 'nmae' is not known; did you mean 'name'"):
        build_from_mapping(Whole, {"nmae": "y"}, "file")
    with pytest.raises(ConfigError, match=r"file\.one\.size: got '3', expected a whole number"):
        build_from_mapping(Whole, {"name": "y", "one": {"size": "3"}}, "file")
    with pytest.raises(ConfigError, match="file: name is missing"):
        build_from_mapping(Whole, {}, "file")


def test_a_record_that_lacks_what_it_needs_is_an_error() -> None:
    with pytest.raises(TypeError):
        read_mapping(Whole, {"parts": [{}], "name": "x"})
