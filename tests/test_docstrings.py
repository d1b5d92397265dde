"""The examples in the docstrings run, and give what they say."""

from __future__ import annotations

import doctest
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import taskgrad as tg

HOME = Path(tg.__file__).parent
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(HOME.parent).with_suffix("").parts)
    for path in HOME.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name):
    results = doctest.testmod(import_module(name))
    assert results.attempted
    assert not results.failed


def test_every_public_name_is_there_and_documented():
    for name in tg.__all__:
        assert getattr(tg, name).__doc__, name
        assert name in dir(tg)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tg.nothing


def test_no_public_name_is_also_a_module():
    """Importing such a module would put it in the place of the name."""
    for name in tg.__all__:
        assert find_spec(f"taskgrad.{name}") is None, name
