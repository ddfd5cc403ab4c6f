"""What mergekit's documentation can express, as files in `dialect/`, run by both engines and compared.

Deterministic methods give the same tensors; random ones the same shapes, the share that they keep and, on average, the
same update. The vocabulary and the chat template of the output are the same too.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_zoo import build_zoo
from typer.testing import CliRunner

from dapt_merge.errors import InputError
from dapt_merge.recipe import load_recipe, load_recipes, recipe_warnings
from dapt_merge.recipe.reading import build_recipe

FILES = sorted((Path(__file__).parent / "dialect").glob("*.yaml"))
RANDOM = ("dare-linear", "dare-ties", "della", "della-linear")
# Its thresholds are quantiles of a divergence that mergekit adds up in float32: elements beside them fall either way.
ON_THE_EDGE = {"arcee-fusion": 0.005}
ROUNDED = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-14}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return build_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture
def both(zoo, tmp_path, monkeypatch):
    """Return a function: file → the folders that the two engines wrote."""
    from dapt_merge.cli.merge import merge

    monkeypatch.chdir(zoo)

    def run(file):
        for engine in ("native", "mergekit"):
            import typer

            app = typer.Typer()
            app.command()(merge)
            # Where mergekit's reading of a gradient differs from ours on purpose, the recipe asks for mergekit's.
            overrides = [f"{name}gradient_outer=mergekit" for name in addressed(file)]
            arguments = [str(file), *overrides, "--engine", engine, "-o", str(tmp_path / engine)]
            result = CliRunner().invoke(app, arguments, catch_exceptions=False)
            assert result.exit_code == 0, result.output
        return tmp_path / "native", tmp_path / "mergekit"

    return run


def addressed(file):
    names = [document.get("name") for document in yaml.safe_load_all(file.read_text())]
    return ["" if name is None else f"{name}." for name in names]


def tensors(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_file_says_what_it_does_and_is_read(file, zoo, monkeypatch):
    monkeypatch.chdir(zoo)
    assert file.read_text().startswith("# ")
    assert load_recipes(file)


JUNK = (
    None, True, -1, 1.5, float("inf"), "", "a", "a+b", "+", [], [None], [[]], [{}], {}, {"a": 1}, {1: 2}, 10**30,
    "union",
    ["a", "b"], {"model": 3}, {"path": []}, {"source": {}}, [{"filter": []}], {"value": None}, "1e-3",
)  # fmt: skip
KEYS = ("weight", "model", "models", "slices", "modules", "parameters", "base_model", "tokens", "source", "average", 3)


def places(content, path=()):
    """Yield the path of every value in a file."""
    if path:
        yield path
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


DOCUMENTS = [document for file in FILES for document in yaml.safe_load_all(file.read_text())]


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_whatever_is_wrong_with_a_file_is_told_with_its_place_and_a_remedy(data):
    content = copy.deepcopy(data.draw(st.sampled_from(DOCUMENTS)))
    content.pop("name", None)
    *above, last = data.draw(st.sampled_from(list(places(content))))
    owner = content
    for key in above:
        owner = owner[key]
    if isinstance(owner, dict) and data.draw(st.booleans()):
        last = data.draw(st.sampled_from(KEYS))
    owner[last] = data.draw(st.sampled_from(JUNK))
    found = read(content)
    if isinstance(found, InputError):
        assert (found.where or "").startswith("recipe.yaml")
        assert found.remedy
    else:
        recipe_warnings(found)
        assert load_recipe(yaml.safe_load(found.to_yaml())) == found


def read(content):
    try:
        return build_recipe(content, [], "recipe.yaml", folder=Path())
    except InputError as error:
        return error


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in FILES if file.stem not in RANDOM], ids=lambda file: file.stem)
def test_both_engines_make_the_same_model(file, both):
    native, theirs = both(file)
    found, expected = tensors(native), tensors(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert found[name].dtype == tensor.dtype
        apart = (found[name].double() - tensor.double()).abs() > ROUNDED[tensor.dtype] * tensor.abs().max()
        assert apart.float().mean() <= ON_THE_EDGE.get(file.stem, 0), name
    assert vocabulary(native) == vocabulary(theirs)
    if "base_model" in file.read_text():  # without one, mergekit takes any model's tokenizer, another in each process
        assert template(native) == template(theirs)
    config, their_config = (json.loads((folder / "config.json").read_text()) for folder in (native, theirs))
    for key in ("num_hidden_layers", "num_layers", "num_decoder_layers", "vocab_size", "architectures"):
        assert config.get(key) == their_config.get(key), key


@pytest.mark.slow
@pytest.mark.parametrize("name", RANDOM)
def test_both_engines_draw_from_the_same_distribution(name, both, zoo):
    file = next(file for file in FILES if file.stem == name)
    native, theirs = both(file)
    base = tensors(zoo / "base")
    found, expected = (moves(tensors(folder), base) for folder in (native, theirs))
    assert found.numel() == expected.numel()
    kept = [(move != 0).double().mean().item() for move in (found, expected)]
    # Two draws of n elements: four standard errors of the difference of two shares.
    assert abs(kept[0] - kept[1]) < 4 * (2 * kept[1] * (1 - kept[1]) / found.numel()) ** 0.5
    means = [(move * sign).double() for move in (found, expected) for sign in [expected_sign(zoo, base)]]
    error = (sum(mean.var() for mean in means) / found.numel()) ** 0.5
    assert abs(means[0].mean() - means[1].mean()) < 4 * error


def moves(merged, base):
    assert merged.keys() == base.keys()
    return torch.cat([(merged[name] - base[name]).flatten() for name in sorted(base)])


def expected_sign(zoo, base):
    """Which way `medical` moved each element: a merge with it moves that way on average."""
    return moves(tensors(zoo / "medical"), base).sign()


def vocabulary(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).get_vocab()


def template(folder):
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder).chat_template
    return found if found is None else found.strip()
