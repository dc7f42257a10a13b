"""A family is one module: what it must have, and that nothing else knows its name."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import ryot
from ryot.models.registry import Family, family_names, find_family

ROOT = Path(ryot.__file__).parent
#: GGUF has names of its own for families and tokenizers, some of them equal, which its reader and writer translate.
GGUF = re.compile(r"models/sources/(\w*gguf\w*|pretokenizers)\.py")
#: "llama" is also onnxruntime-genai's word for the kind of its engine.
ALLOWED = {("deploy/bundle.py", "llama")}


@pytest.mark.parametrize("name", family_names())
def test_a_family_has_what_the_protocol_says(name: str) -> None:
    module = find_family(name, "here")
    members = {key: value for key, value in vars(Family).items() if inspect.isfunction(value) and key[0] != "_"}
    assert len(members) == 5
    for key, expected in members.items():
        signature = inspect.signature(expected)
        wanted = list(signature.parameters.values())[1:]
        assert inspect.signature(getattr(module, key)) == signature.replace(parameters=wanted), key


@pytest.mark.parametrize("name", family_names())
def test_a_family_says_where_its_keys_come_from(name: str) -> None:
    source = importlib.import_module(f"ryot.models.families.{name}").__doc__ or ""
    assert "transformers 5" in source and f"modeling_{name.removesuffix('_text')}.py" in source


def test_no_other_module_names_a_family() -> None:
    found, names = set(), frozenset(family_names())
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith("models/families/") or GGUF.fullmatch(relative):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in names:
                found.add((relative, node.value))
            elif isinstance(node, (ast.Name, ast.Attribute, ast.alias)):
                identifier = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name"}[type(node)]
                if getattr(node, identifier) in names:
                    found.add((relative, getattr(node, identifier)))
    assert found - ALLOWED == set()
