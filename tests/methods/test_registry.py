"""Methods by name, from this package and from others."""

import sys
import types

import pytest

from dapt_merge.methods import registry


@pytest.fixture
def fresh_registry(monkeypatch):
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.setattr(registry, "_loaded", True)
    return registry


def test_a_name_can_be_taken_once(fresh_registry):
    register = fresh_registry.method("of-a-test", reference="an example")
    register(lambda base, models, context: base)
    with pytest.raises(ValueError, match="twice"):
        register(lambda base, models, context: base)


def test_methods_of_other_packages_are_found_and_a_broken_one_takes_nothing_away(fresh_registry, monkeypatch):
    def load_good():
        fresh_registry.method("from-a-plugin", reference="an example")(lambda base, models, context: base)
        return types.ModuleType("good")

    def load_bad():
        raise ImportError("no module named tensorflow")

    entries = [types.SimpleNamespace(value="bad", load=load_bad), types.SimpleNamespace(value="good", load=load_good)]
    monkeypatch.setattr(fresh_registry, "entry_points", lambda group: entries)
    monkeypatch.setattr(fresh_registry, "_loaded", False)
    with pytest.warns(UserWarning, match="tensorflow"):
        names = fresh_registry.method_names()
    assert {"from-a-plugin", "ties"} <= set(names)
    assert "dapt_merge.methods.ties" in sys.modules
