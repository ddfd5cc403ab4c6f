"""Recipe files: what is accepted, and how each fault is told (what, file and key, what to do)."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dapt_merge.errors import InputError
from dapt_merge.recipe import Recipe, load_recipe

VALID = """
merge_method: slerp
base_model: b
models:
  - model: b
  - model: d
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 1]
    - value: 0.5
dtype: bfloat16
"""


@pytest.fixture
def file(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def told(path: Path, overrides: tuple[str, ...] = ()) -> InputError:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    assert caught.value.remedy
    assert str(path) in caught.value.where
    return caught.value


class TestFiles:
    def test_a_valid_file_is_read(self, file):
        recipe = load_recipe(file(VALID))
        assert recipe.merge_method == "slerp"
        assert recipe.references() == ("b", "d")
        assert recipe.task_models() == ("d",)
        assert recipe.output_dtype == "bfloat16"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "empty"),
            ("# only a comment\n", "empty"),
            ("- a\n- b\n", "holds a list"),
            ("slerp", "holds a text"),
            (b"\xff\xfe\x00\x01binary", "not UTF-8"),
            (b"\x00" * (2**20 + 1), "too large"),
        ],
    )
    def test_a_file_that_is_no_recipe_is_refused(self, file, text, said):
        assert said in told(file(text)).what

    def test_a_syntax_error_is_told_with_its_line(self, file):
        error = told(file("merge_method: slerp\nbase_model: [b\nmodels: x\n"))
        assert "line 3" in error.where

    def test_a_key_given_twice_is_refused_with_its_line(self, file):
        error = told(file(VALID + "dtype: float32\n"))
        assert "'dtype' is given twice" in error.what
        assert "line 13" in error.where

    def test_whole_numbers_are_no_weights(self, file):
        """mergekit takes int64, and makes zeros of weights below 1."""
        import torch
        from mergekit.common import dtype_from_name

        assert not torch.full((4,), 0.99).to(dtype_from_name("int64")).any()
        error = told(file(VALID.replace("dtype: bfloat16", "dtype: int64")))
        assert "rounded to whole numbers" in error.what
        assert "dtype" in error.where

    def test_a_file_cannot_construct_python_objects(self, file, tmp_path):
        mark = tmp_path / "executed"
        error = told(file(f"merge_method: !!python/object/apply:os.mkdir ['{mark}']\n"))
        assert "not valid YAML" in error.what
        assert not mark.exists()

    def test_nested_aliases_do_not_explode(self, file):
        bomb = "a: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
        assert "unknown key" in told(file(bomb + VALID)).what
        lists = "parameters:\n  a:\n    &a0 [x, x]\n" + "".join(
            f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
        )
        told(file(lists + "  t: *a29\n" + VALID.split("parameters:")[0]))

    def test_a_missing_file_and_a_folder_are_told_apart(self, tmp_path):
        assert "no such file" in told(tmp_path / "absent.yaml").what
        assert "folder" in told(tmp_path).what

    def test_models_beside_the_recipe_are_found_when_absent_from_the_current_folder(self, file, tmp_path, monkeypatch):
        (tmp_path / "d").mkdir()
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        recipe = load_recipe(file(VALID))
        assert recipe.references() == ("b", str(tmp_path / "d"))
        (elsewhere / "d").mkdir()
        assert load_recipe(file(VALID)).references() == ("b", "d")


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: ties\nbase_model: b\nparameters:\nmodels:\n  - {model: d, parameters: {weight: 1}}\n"
        "  - model: b\n    parameters:\nslices:\nmodules:\ntokenizer:\nchat_template:\ndtype:\n",
        "merge_method: passthrough\nmodels:\nbase_model:\nslices:\n  - base_model:\n    parameters:\n    sources:\n"
        "      - {model: d, layer_range: [0, 1], parameters: }\n",
        "merge_method: passthrough\nmodules:\n  default:\n    models: [{model: d}]\n    slices:\n    parameters:\n",
    ],
    ids=["models", "slices", "modules"],
)
def test_a_key_that_holds_nothing_is_as_if_it_were_not_there(text):
    recipe = load_recipe(yaml.safe_load(text))
    assert "parameters: {}" not in recipe.to_yaml()
    assert load_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


class TestKeys:
    @pytest.mark.parametrize(
        ("old", "new", "what", "where"),
        [
            ("dtype:", "dtyp:", "unknown key 'dtyp'. Did you mean 'dtype'?", "dtyp"),
            ("merge_method:", "merge_metod:", "Did you mean 'merge_method'?", "merge_metod"),
            ("  t:", "  tt:", "slerp has no parameter 'tt'. Did you mean 't'?", "parameters.tt"),
            ("- model: d", "- modell: d", "Did you mean 'model'?", "models.1.modell"),
            ("filter:", "fliter:", "Did you mean 'filter'?", "parameters.t.0.fliter"),
            ("merge_method: slerp", "merge_method: slurp", "Did you mean 'slerp'?", "merge_method"),
            ("bfloat16", "bflaot16", "Did you mean 'bfloat16'?", "dtype"),
            ("merge_method: slerp", "merge_method: 3", "a text is expected", "merge_method"),
            ("models:\n  - model: b\n  - model: d", "models: d", "a list is expected", "models"),
            ("- model: d", "- d", "models.1: a mapping of keys to values is expected, found a text ('d')", "models.1"),
            ("- model: b\n  - model: d", "[]", "at least 1", "models"),
            ("base_model: b\n", "", "needs a base model", "base_model"),
            ("merge_method: slerp\n", "", "'merge_method' is missing", "merge_method"),
            ("models:\n  - model: b\n  - model: d\n", "", "'models' is missing", "models"),
            ("- model: d", "- model: d\n  - model: ./d/", "listed twice", "models.2.model"),
            ("- model: d", "- model: d\n  - model: e", "merges 1 model(s) besides the base", "models"),
            ("- model: d", "- model: d\n    weight: 1", "unknown key 'weight'", "models.1.weight"),
            (
                "- model: d",
                "- model: d\n    parameters: {t: 0.5}",
                "holds for the whole merge",
                "models.1.parameters.t",
            ),
            ("dtype:", "seed: -1\ndtype:", "greater than or equal to 0", "seed"),
            ("dtype:", "seed: true\ndtype:", "a whole number is expected", "seed"),
            ("dtype:", "slices: []\ndtype:", "at least 1", "slices"),
            ("dtype:", "modules: {}\ndtype:", "at least 1", "modules"),
            ("dtype:", "modules: {x: {}}\ndtype:", "both 'modules' and 'models'", "modules"),
            ("dtype:", "tokenizer: {sources: base}\ndtype:", "Did you mean 'source'", "tokenizer.sources"),
            ("dtype:", "gradient_outer: first\ndtype:", "'last' or 'mergekit'", "gradient_outer"),
        ],
    )
    def test_each_fault_is_told_with_its_key(self, file, old, new, what, where):
        assert old in VALID
        error = told(file(VALID.replace(old, new, 1)))
        assert what in error.what
        assert where in error.where

    @pytest.mark.parametrize(
        ("value", "what", "where"),
        [
            ("1.5", "'t' is 1.5, expected a number in [0, 1]", "parameters.t"),
            ("-0.1", "expected a number in [0, 1]", "parameters.t"),
            (".nan", "'t' is nan, expected", "parameters.t"),
            ("half", "'t' is 'half', expected a number", "parameters.t"),
            ("true", "'t' is True, expected a number", "parameters.t"),
            ("null", "'t' is nothing, expected a number", "parameters.t"),
            ("[]", "empty list", "parameters.t"),
            ("[0, 2]", "expected a number", "parameters.t.1"),
            ("[0, [1]]", "expected a number", "parameters.t.1"),
            ("[{value: 0.5}, 0.3]", "has no 'value:'", "parameters.t.1"),
            ("[{filter: mlp}]", "no 'value'", "parameters.t.0"),
            ("[{filter: 3, value: 0.1}]", "filter is 3", "parameters.t.0.filter"),
            ("{filter: '', value: 0.1}", "filter is ''", "parameters.t"),
        ],
    )
    def test_each_bad_value_is_told_with_its_place(self, file, value, what, where):
        content = yaml.safe_load(VALID)
        content["parameters"]["t"] = yaml.safe_load(value)
        error = told(file(yaml.safe_dump(content)))
        assert what in error.what
        assert error.where.endswith(where) or where in error.where

    def test_a_required_parameter_that_is_missing_is_told_with_its_model(self, file):
        text = "merge_method: ties\nbase_model: b\nmodels: [{model: d, parameters: {weight: 1}}, {model: e}]\n"
        error = told(file(text))
        assert "'weight'" in error.what
        assert "'e'" in error.what

    def test_flags_may_be_written_as_numbers_but_not_as_words(self, file):
        text = "merge_method: linear\nmodels: [{model: d}, {model: e}]\nparameters: {weight: 1, normalize: %s}\n"
        assert load_recipe(file(text % "1.0")).parts[0].clauses["normalize"][0][0].anchors == (True,)
        ties = "merge_method: ties\nbase_model: b\nmodels: [{model: d}]\nparameters: {weight: 1, normalize: 0}\n"
        assert load_recipe(file(ties)).parts[0].clauses["normalize"][0][0].anchors == (False,)
        assert "expected true or false" in told(file(text % "sometimes")).what


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["model", "parameters", "filter", "value", "weight", "t", "x"]) | st.integers(0, 2),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
FAULTY = st.fixed_dictionaries(
    {},
    optional={
        "merge_method": st.sampled_from(["slerp", "ties", "linear"]) | JUNK,
        "base_model": st.just("b") | JUNK,
        "models": st.just([{"model": "d"}]) | JUNK,
        "parameters": st.dictionaries(st.sampled_from(["t", "weight", "normalize"]), JUNK, max_size=2) | JUNK,
        "dtype": JUNK,
        "seed": JUNK,
        "unknown": JUNK,
    },
)
OVERRIDES = st.lists(st.sampled_from(["t=1", "models.0=x", "models.0.parameters.t.0=1", "parameters=3", "seed.a.b=1"]))


class TestAnything:
    @settings(max_examples=300, deadline=None)
    @given(content=FAULTY, overrides=OVERRIDES)
    def test_whatever_a_recipe_holds_it_is_read_or_told_in_three_parts(self, content, overrides):
        try:
            recipe = load_recipe(content, overrides)
        except InputError as error:
            told_in_three_parts = bool(error.what and error.where and error.remedy)
        else:
            assert load_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
            return
        assert told_in_three_parts


class TestRoundTrip:
    def test_the_yaml_of_a_recipe_reads_back_as_the_same_recipe(self, file):
        recipe = load_recipe(file(VALID), ["seed=3", "gradient_outer=last"])
        assert load_recipe(file(recipe.to_yaml())) == recipe

    def test_mergekit_reads_the_yaml_of_a_recipe(self, file):
        from mergekit.config import MergeConfiguration

        config = MergeConfiguration.model_validate(yaml.safe_load(load_recipe(file(VALID)).to_yaml()))
        assert str(config.base_model) == "b"
        assert config.parameters["t"][0].value == [0, 0.5, 1]

    def test_a_recipe_cannot_be_changed(self):
        recipe = load_recipe(yaml.safe_load(VALID))
        with pytest.raises(ValueError, match="frozen"):
            recipe.seed = 2  # type: ignore[misc]
        assert isinstance(recipe, Recipe)


class TestOverrides:
    def content(self) -> dict:
        return {
            "merge_method": "ties",
            "base_model": "b",
            "models": [{"model": "b"}, {"model": "d", "parameters": {"weight": 0.5}}],
            "parameters": {"density": 0.4},
        }

    def test_a_dotted_key_changes_one_place(self):
        recipe = load_recipe(self.content(), ["models.1.parameters.weight=0.6", "parameters.lambda=0.9", "seed=4"])
        assert recipe.models[1].parameters == {"weight": 0.6}
        assert recipe.parameters == {"density": 0.4, "lambda": 0.9}
        assert recipe.seed == 4

    def test_a_parameters_own_name_changes_it_where_the_recipe_sets_it(self):
        recipe = load_recipe(self.content(), ["weight=0.6", "density=[0.1, 0.9]"])
        assert recipe.models[1].parameters == {"weight": 0.6}
        assert recipe.parameters == {"density": [0.1, 0.9]}

    def test_a_short_name_that_could_mean_several_models_is_refused(self):
        content = self.content()
        content["models"].append({"model": "e", "parameters": {"weight": 0.1}})
        with pytest.raises(InputError, match="does not say which") as caught:
            load_recipe(content, ["weight=0.6"])
        assert "models.2.parameters.weight" in caught.value.remedy

    def test_a_change_of_method_comes_first_wherever_it_stands(self):
        content = {"merge_method": "linear", "base_model": "b", "models": [{"model": "d"}]}
        assert load_recipe(content, ["t=0.3", "merge_method=slerp"]).parameters == {"t": 0.3}

    def test_the_callers_mapping_stays_as_it_was(self):
        content = self.content()
        load_recipe(content, ["weight=0.6", "parameters.density=0.1"])
        assert content == self.content()

    @pytest.mark.parametrize(
        ("override", "what"),
        [
            ("weight", "not of the form key=value"),
            ("=3", "not of the form key=value"),
            ("weight=[", "not valid YAML"),
            ("weight=", "gives no value"),
            ("wieght=0.3", "Did you mean 'weight'?"),
            ("models.7.parameters.weight=1", "not an index"),
            ("models.x.parameters.weight=1", "not an index"),
            ("seed.x=1", "a whole number is expected"),
            ("merge_method=teis", "Did you mean 'ties'?"),
            ("parameters.densty=1", "Did you mean 'density'?"),
            ("weight=half", "expected a finite number"),
        ],
    )
    def test_each_bad_override_is_told(self, override, what):
        with pytest.raises(InputError, match=what.replace("?", r"\?")):
            load_recipe(self.content(), [override])


def references(model):
    return load_recipe({"merge_method": "passthrough", "models": [{"model": model}]}).references()


class TestReferences:
    @pytest.mark.parametrize(
        ("long", "short"),
        [
            ({"model": "a"}, "a"),
            ({"model": {"path": "a"}}, "a"),
            ({"model": {"path": "a", "revision": "v1"}}, "a@v1"),
            ({"model": "a", "lora": "b"}, "a+b"),
            ({"model": {"path": "a", "revision": None}, "lora": {"path": "b", "revision": "v2"}}, "a+b@v2"),
            ({"model": "a@v1", "lora": "b@v2"}, "a@v1+b@v2"),
            ({"model": "a", "override_architecture": None}, "a"),
            ({"model": "a", "lora": "b", "override_architecture": "C"}, "a+b?override_architecture=C"),
        ],
    )
    def test_a_long_form_is_the_text_that_it_stands_for(self, long, short):
        assert references(long) == references(short) == (short,)

    @pytest.mark.parametrize(
        ("long", "what", "where"),
        [
            ({"lora": "b"}, "no 'model:' in it", "models.0.model"),
            ({"model": "a", "lroa": "b"}, "no 'lroa'. Did you mean 'lora'?", "models.0.model"),
            ({"model": {"path": 3}}, "expected a path", "models.0.model.model"),
            ({"model": "a", "override_architecture": 3}, "name of a model class", "models.0.model.override_arch"),
            ({"model": "a", "override_architecture": "a b"}, "name of a model class", "models.0.model.override_arch"),
        ],
    )
    def test_a_long_form_that_is_none_is_told_with_its_place(self, long, what, where):
        with pytest.raises(InputError) as caught:
            references(long)
        assert what in caught.value.what
        assert where in caught.value.where

    def test_each_path_in_a_text_is_looked_for_beside_the_recipe(self, file, tmp_path, monkeypatch):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        (tmp_path / "b").mkdir()
        model = "{model: lab/a@v1, lora: b, override_architecture: C}"
        recipe = load_recipe(file(f"merge_method: passthrough\nmodels: [{{model: {model}}}]\n"))
        assert recipe.references() == (f"lab/a@v1+{tmp_path / 'b'}?override_architecture=C",)

    def test_mergekit_gets_a_stated_architecture_in_its_own_words(self):
        from mergekit.config import MergeConfiguration

        from dapt_merge.merging.mergekit_engine import mergekit_content

        model = {"model": "a@v1", "lora": "b", "override_architecture": "C"}
        recipe = load_recipe({"merge_method": "passthrough", "models": [{"model": model}]})
        (found,) = MergeConfiguration.model_validate(mergekit_content(recipe)).referenced_models()
        assert (str(found), found.override_architecture) == ("a@v1+b", "C")


class TestLaxValues:
    """What mergekit takes as a number or a flag, whatever its type in YAML."""

    @pytest.mark.parametrize("given", [["0", "8"], [0.0, 8.0], ["0", 8]])
    def test_a_layer_range(self, given):
        sources = [{"model": "a", "layer_range": given}]
        recipe = load_recipe({"merge_method": "passthrough", "slices": [{"sources": sources, "residual_weight": "1"}]})
        assert recipe.slices[0].sources[0].layer_range == [0, 8]
        assert recipe.slices[0].residual_weight == 1.0

    @pytest.mark.parametrize("given", [["0", "half"], [0.5, 8], [0, None]])
    def test_a_layer_range_that_is_none_is_told_with_its_place(self, given):
        sources = [{"model": "a", "layer_range": given}]
        with pytest.raises(InputError, match="a whole number is expected") as caught:
            load_recipe({"merge_method": "passthrough", "slices": [{"sources": sources}]})
        assert "slices.0.sources.0.layer_range" in caught.value.where

    @pytest.mark.parametrize(
        ("given", "flag"), [("true", True), ("Yes", True), ("on", True), ("1", True), ("FALSE", False), ("0", False)]
    )
    def test_a_flag_in_quotes(self, given, flag):
        parameters = {"weight": "1", "normalize": given, "rescale": given, "density": "5e-1"}
        content = {"merge_method": "ties", "base_model": "b", "models": [{"model": "d"}], "parameters": parameters}
        clauses = load_recipe(content).parts[0].clauses
        assert [clauses[name][0][0].anchors for name in ("normalize", "rescale")] == [(flag,), (flag,)]
        assert clauses["density"][0][0].anchors == (0.5,)

    def test_the_settings_of_a_token(self):
        entry = {"source": {"kind": "model_token", "model": {"model": "d"}, "token_id": "3"}, "force": "yes"}
        block = {"source": "base", "tokens": {"<x>": entry}, "pad_to_multiple_of": "64"}
        content = {"merge_method": "linear", "base_model": "b", "models": [{"model": "d"}], "tokenizer": block}
        settings = load_recipe({**content, "parameters": {"weight": 1}}).tokenizer
        assert settings.pad_to_multiple_of == 64
        assert settings.tokens["<x>"].token_id == 3
        assert settings.tokens["<x>"].force is True
        assert settings.tokens["<x>"].model == "d"

    def test_a_range_of_layers_beside_a_whole_model_is_told_where_it_belongs(self, file):
        error = told(file(VALID.replace("- model: d", "- model: d\n    layer_range: [0, 8]")))
        assert "unknown key 'layer_range'" in error.what
        assert "slices:" in error.remedy
