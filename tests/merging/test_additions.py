"""What our recipes have beside mergekit's: target, freeze, stochastic rounding, averages, allowed mismatches."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from merging_models import CONFIG, load_weights, random_weights, save_model

from dapt_merge.errors import InputError
from dapt_merge.merging import merge_to_disk, plan_merge
from dapt_merge.merging.rounding import round_stochastically
from dapt_merge.recipe import load_recipe, recipe_fingerprint, recipe_warnings

UP = "model.layers.0.mlp.up_proj.weight"


def recipe(folders, **keys):
    content = {
        "merge_method": "task_arithmetic",
        "base_model": str(folders["base"]),
        "models": [{"model": str(folders["one"]), "parameters": {"weight": 0.5}}],
    }
    return load_recipe({**content, **keys})


def merged(made, out):
    report = merge_to_disk(plan_merge(made), out)
    return load_weights(out), report


class TestTarget:
    def test_the_difference_from_the_base_is_added_to_the_target(self, models, tmp_path):
        base, one, two = (load_weights(models[name]) for name in ("base", "one", "two"))
        found, report = merged(recipe(models, target=str(models["two"])), tmp_path / "out")
        for name, tensor in found.items():
            exact = two[name].double() + 0.5 * (one[name].double() - base[name].double())
            torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-8)
        assert set(report.inputs) == {str(models[name]) for name in ("base", "one", "two")}

    def test_weight_zero_is_the_target_bit_for_bit(self, models, tmp_path):
        entry = {"model": str(models["one"]), "parameters": {"weight": 0}}
        found, _ = merged(recipe(models, target=str(models["two"]), models=[entry]), tmp_path / "out")
        two = load_weights(models["two"])
        assert all(torch.equal(tensor, two[name]) for name, tensor in found.items())

    def test_configuration_and_tokenizer_are_the_targets(self, models, tmp_path):
        config = {**CONFIG, "eos_token_id": 7}
        instruct = save_model(tmp_path / "instruct", random_weights(5), config)
        (instruct / "chat_template.jinja").write_text("{{ messages }}")
        merged(recipe(models, target=str(instruct)), tmp_path / "out")
        assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 7
        assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"

    def test_it_changes_the_fingerprint(self, models):
        inputs = {str(path): name for name, path in models.items()}
        plain, with_target = recipe(models), recipe(models, target=str(models["two"]))
        assert recipe_fingerprint(plain, inputs) != recipe_fingerprint(with_target, inputs)

    @pytest.mark.parametrize(
        ("keys", "what"),
        [
            ({"base_model": None, "merge_method": "linear", "target": "t"}, "has no base"),
            ({"target": "B"}, "the target is the base"),
            ({"target": 3}, "a text is expected"),
        ],
    )
    def test_a_target_without_a_meaning_is_told(self, models, keys, what):
        keys = {name: str(models["base"]) if value == "B" else value for name, value in keys.items()}
        with pytest.raises(InputError) as caught:
            recipe(models, **keys)
        assert what in caught.value.what
        assert caught.value.remedy


class TestFreeze:
    def test_frozen_tensors_stay_the_bases_bit_for_bit_and_the_others_move(self, models, tmp_path):
        found, _ = merged(recipe(models, freeze=["embedding", "layers.*.mlp", "model.norm."]), tmp_path / "out")
        base = load_weights(models["base"])
        same = {name for name in found if torch.equal(found[name], base[name])}
        assert same == {name for name in found if "embed" in name or ".mlp." in name or name == "model.norm.weight"}

    def test_with_a_target_they_stay_the_targets(self, models, tmp_path):
        found, _ = merged(recipe(models, target=str(models["two"]), freeze=["mlp"]), tmp_path / "out")
        assert torch.equal(found[UP], load_weights(models["two"])[UP])

    @pytest.mark.parametrize(
        ("freeze", "what"),
        [(["mpl"], "Did you mean 'mlp'?"), (["mlp", "layers.7."], "covers no tensor"), (["*"], "every tensor"),
         (["weight"], "every tensor is frozen"), ([""], "every tensor")],
    )  # fmt: skip
    def test_a_pattern_without_a_meaning_is_told(self, models, freeze, what):
        with pytest.raises(InputError, match=what.replace("?", r"\?")) as caught:
            plan_merge(recipe(models, freeze=freeze))
        assert "freeze" in caught.value.where

    def test_it_needs_a_base(self, models):
        with pytest.raises(InputError, match="names no base"):
            recipe(models, freeze=["mlp"], merge_method="linear", base_model=None)


class TestStochasticRounding:
    @pytest.mark.parametrize(("dtype", "digits", "smallest"), [(torch.bfloat16, 7, 0.0), (torch.float16, 10, 2**-24)])
    def test_it_is_unbiased_and_takes_only_the_two_neighbours(self, dtype, digits, smallest):
        values = torch.cat([torch.linspace(-2, 2, 41), torch.tensor([1e-7, -3e-8, 6e4])]).double()
        gap = torch.exp2(values.abs().log2().floor() - digits).clamp_min(smallest)
        rounded = [round_stochastically(values, dtype, seed, "w").double() for seed in range(2000)]
        drawn = torch.stack(rounded)
        assert ((drawn - values).abs() < gap * 1.0001).all()
        assert all(len(set(column.tolist())) <= 2 for column in drawn.T)
        assert ((drawn.mean(0) - values).abs() <= 5 * gap / 2 / 2000**0.5 + 1e-7 * values.abs()).all()

    def test_what_the_dtype_holds_stays(self):
        values = torch.randn(1000).bfloat16().float()
        assert torch.equal(round_stochastically(values, torch.bfloat16, 0, "w").float(), values)

    def test_it_depends_on_seed_name_and_index_alone(self):
        values = torch.randn(600_000)
        whole = round_stochastically(values, torch.bfloat16, 1, "w")
        assert torch.equal(whole, round_stochastically(values.view(600, 1000), torch.bfloat16, 1, "w").view(-1))
        assert not torch.equal(whole, round_stochastically(values, torch.bfloat16, 2, "w"))
        assert not torch.equal(whole, round_stochastically(values, torch.bfloat16, 1, "v"))

    def test_an_update_that_nearest_loses_survives_on_average(self, models, tmp_path):
        base = {name: tensor.bfloat16().float() for name, tensor in random_weights(3).items()}
        moved = {name: tensor * (1 + 2**-11) for name, tensor in base.items()}
        folders = {"base": save_model(tmp_path / "b", base), "one": save_model(tmp_path / "o", moved)}
        kept = {}
        for mode in ("nearest", "stochastic"):
            found, _ = merged(recipe(folders, rounding=mode, out_dtype="bfloat16"), tmp_path / mode)
            steps = [(found[name].double() - base[name]) / (moved[name].double() - base[name]) for name in found]
            kept[mode] = torch.cat([step.flatten() for step in steps]).mean().item()
        assert kept["nearest"] == 0
        assert abs(kept["stochastic"] - 0.5) < 0.1
        again, _ = merged(recipe(folders, rounding="stochastic", out_dtype="bfloat16"), tmp_path / "again")
        assert all(torch.equal(found[name], again[name]) for name in found)

    def test_the_seed_is_part_of_the_fingerprint_only_then(self, models):
        inputs = {str(path): name for name, path in models.items()}

        def fingerprint(**keys):
            return recipe_fingerprint(recipe(models, **keys), inputs)

        assert fingerprint(seed=1) == fingerprint()
        assert len({fingerprint(), fingerprint(rounding="stochastic"), fingerprint(rounding="stochastic", seed=1)}) == 3

    def test_it_is_reported_where_nothing_is_rounded(self, models):
        assert "no effect" in recipe_warnings(recipe(models, rounding="stochastic", dtype="float32"))[0]


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """A run of four checkpoints, each a step further; 100 comes after 90, whatever the alphabet says."""
    folder = tmp_path_factory.mktemp("run")
    weights = load_weights(models["base"])
    for seed, step in enumerate((30, 60, 90, 100), start=10):
        weights = random_weights(seed, near=weights)
        save_model(folder / f"checkpoint-{step}", weights)
    return folder


class TestAverage:
    def steps(self, run):
        return [load_weights(run / f"checkpoint-{step}") for step in (30, 60, 90, 100)]

    def averaged(self, models, average, **entry):
        return recipe(models, models=[{**entry, "average": average, "parameters": {"weight": 1}}])

    @pytest.mark.parametrize(
        ("average", "shares"),
        [
            ({}, [0.25, 0.25, 0.25, 0.25]),
            ({"window": 2}, [0, 0, 0.5, 0.5]),
            ({"decay": 0.5}, [1 / 15, 2 / 15, 4 / 15, 8 / 15]),
        ],
    )
    def test_the_mean_of_a_run_is_taken_before_the_method(self, models, run, tmp_path, average, shares):
        found, _ = merged(self.averaged(models, average, model=str(run)), tmp_path / "out")
        for name, tensor in found.items():
            exact = sum(share * step[name].double() for share, step in zip(shares, self.steps(run), strict=True))
            torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-8)

    def test_a_list_says_which_checkpoints(self, models, run, tmp_path):
        listed = [str(run / "checkpoint-30"), str(run / "checkpoint-90")]
        found, _ = merged(self.averaged(models, {"checkpoints": listed}), tmp_path / "out")
        first, _, third, _ = self.steps(run)
        torch.testing.assert_close(found[UP], (first[UP] + third[UP]) / 2, rtol=1e-6, atol=1e-8)

    def test_a_recipe_with_an_average_reads_back_from_its_yaml(self, models, run):
        for made in (
            self.averaged(models, {}, model=str(run)),
            self.averaged(models, {"decay": 0.5}, model=str(run)),
            self.averaged(models, {"checkpoints": ["a", "b"], "window": 2}),
        ):
            assert load_recipe(yaml.safe_load(made.to_yaml())) == made

    def test_the_fingerprint_follows_the_members_and_their_shares(self, models, run):
        def fingerprint(average):
            made = self.averaged(models, average, model=str(run))
            opened = plan_merge(made).checkpoints
            return recipe_fingerprint(made, {name: checkpoint.fingerprint() for name, checkpoint in opened.items()})

        found = {fingerprint(average) for average in ({}, {"window": 2}, {"window": 3}, {"decay": 0.5})}
        assert len(found) == 4
        assert fingerprint({}) == fingerprint({"window": 4})

    @pytest.mark.parametrize(
        ("entry", "what"),
        [
            ({"model": "RUN", "average": {"window": 5}}, "5 are needed"),
            ({"model": "RUN", "average": {"window": 0}}, "greater than or equal to 1"),
            ({"model": "RUN", "average": {"decay": 1.0}}, "less than 1"),
            ({"model": "RUN", "average": {"window": 2, "decay": 0.5}}, "both a window and a decay"),
            ({"model": "RUN", "average": {"windw": 2}}, "Did you mean 'window'?"),
            ({"model": "RUN", "average": {"checkpoints": ["a", "b"]}}, "both 'model'"),
            ({"average": {"window": 2}}, "'model' is missing"),
            ({"model": "nowhere", "average": {}}, "0 checkpoint"),
        ],
    )
    def test_each_misuse_is_told(self, models, run, entry, what):
        entry = {name: str(run) if value == "RUN" else value for name, value in entry.items()}
        with pytest.raises(InputError) as caught:
            plan_merge(recipe(models, models=[{**entry, "parameters": {"weight": 1}}]))
        assert what in caught.value.what
        assert caught.value.remedy


def stack(folders, *ranges, sources=("base", "one"), **keys):
    """Slices of the same layers of two models, the first of them the base."""
    slices = [
        {"sources": [{"model": str(folders[name]), "layer_range": list(span)} for name in sources]} for span in ranges
    ]
    content = {"merge_method": "task_arithmetic", "base_model": str(folders["base"]), "parameters": {"weight": 0.5}}
    return load_recipe({**content, "slices": slices, **keys})


def up(weights, layer):
    return weights[f"model.layers.{layer}.mlp.up_proj.weight"]


class TestInStacks:
    def test_the_difference_in_each_layer_is_added_to_the_targets_same_layer(self, models, tmp_path):
        base, one, two = (load_weights(models[name]) for name in ("base", "one", "two"))
        found, _ = merged(stack(models, (1, 2), (0, 2), target=str(models["two"])), tmp_path / "out")
        for layer, origin in enumerate((1, 0, 1)):
            expected = up(two, origin) + 0.5 * (up(one, origin) - up(base, origin))
            torch.testing.assert_close(up(found, layer), expected, rtol=1e-6, atol=1e-8)

    def test_frozen_tensors_are_the_bases_own_layers_or_the_targets(self, models, tmp_path):
        base, two = (load_weights(models[name]) for name in ("base", "two"))
        found, _ = merged(stack(models, (1, 2), (0, 1), freeze=["mlp"]), tmp_path / "out")
        assert torch.equal(up(found, 0), up(base, 1))
        assert torch.equal(up(found, 1), up(base, 0))
        found, _ = merged(stack(models, (1, 2), freeze=["mlp"], target=str(models["two"])), tmp_path / "target")
        assert torch.equal(up(found, 0), up(two, 1))

    def test_a_target_needs_a_base_in_every_slice(self, models):
        single = {"sources": ("base",), "merge_method": "passthrough", "parameters": {}}
        with pytest.raises(InputError, match="this passthrough has no base") as caught:
            stack(models, (0, 2), target=str(models["two"]), **single)
        assert "slices.0" in caught.value.where

    def test_a_target_with_fewer_layers_is_told(self, models, tmp_path):
        short = {name: tensor for name, tensor in random_weights(3).items() if ".1." not in name}
        target = save_model(tmp_path / "short", short, {**CONFIG, "num_hidden_layers": 1})
        with pytest.raises(InputError, match="the target has no 'model"):
            plan_merge(stack(models, (0, 2), target=str(target)))

    def test_a_slice_without_the_base_has_nothing_to_keep_frozen_tensors_at(self, models):
        made = stack(models, (0, 2), sources=("one", "two"), merge_method="linear", freeze=["mlp"])
        with pytest.raises(InputError, match="no base among its sources"):
            plan_merge(made)


class TestMismatchAndDtype:
    def test_a_mismatch_is_refused_until_it_is_allowed_and_then_reported(self, models, tmp_path):
        other = save_model(tmp_path / "m", random_weights(1), {**CONFIG, "rope_theta": 5e5})
        entries = [{"model": str(other), "parameters": {"weight": 0.5}}]
        with pytest.raises(InputError, match="rope_theta") as caught:
            plan_merge(recipe(models, models=entries))
        assert "allow_config_mismatch" in caught.value.remedy
        plan = plan_merge(recipe(models, models=entries, allow_config_mismatch=True))
        assert any("rope_theta" in warning for warning in plan.warnings)

    def test_a_live_model_takes_them_for_the_recipes_that_allow_it(self, models, tmp_path):
        from dapt_merge import ResidentMerger, merge, open_checkpoint

        other = save_model(tmp_path / "m", random_weights(1), {**CONFIG, "rope_theta": 5e5})
        held = {str(models["base"]): open_checkpoint(models["base"]), str(other): open_checkpoint(other)}
        live = merge(models["base"], models["one"], "linear", weight=0.5).to_model()
        with pytest.raises(InputError, match="rope_theta"):
            ResidentMerger(live, held)
        merger = ResidentMerger(live, held, allow_config_mismatch=True)
        entries = [{"model": str(other), "parameters": {"weight": 0.5}}]
        report = merger.apply(recipe(models, models=entries, allow_config_mismatch=True))
        assert any("rope_theta" in warning for warning in report.warnings)
        with pytest.raises(InputError, match="rope_theta"):
            merger.apply(recipe(models, models=entries))

    def test_a_working_dtype_of_float32_is_what_happens_anyway(self, models):
        assert recipe_warnings(recipe(models, dtype="float32", out_dtype="bfloat16")) == []

    def test_a_narrower_dtype_beside_another_out_dtype_rounds_the_inputs_first(self, models, tmp_path):
        made = recipe(models, dtype="bfloat16", out_dtype="float32")
        found, report = merged(made, tmp_path / "out")
        base, one = (load_weights(models[name])[UP].bfloat16().float() for name in ("base", "one"))
        torch.testing.assert_close(found[UP], base + 0.5 * (one - base), rtol=1e-6, atol=1e-8)
        assert "rounded to dtype 'bfloat16'" in report.warnings[0]

    def test_dtype_alone_is_the_outputs_and_the_inputs_keep_their_digits(self, models, tmp_path):
        found, _ = merged(recipe(models, dtype="bfloat16"), tmp_path / "out")
        base, one = (load_weights(models[name])[UP] for name in ("base", "one"))
        assert torch.equal(found[UP], (base + 0.5 * (one - base)).bfloat16())


class TestOtherWays:
    """The disk and a model in memory give the same bits for these too."""

    def test_a_model_in_memory_has_the_disks_bits(self, models, run, tmp_path):
        from dapt_merge.merging import merge

        keys = {"target": str(models["two"]), "freeze": ["norm"], "rounding": "stochastic", "out_dtype": "bfloat16"}
        mean = {"model": str(run), "average": {"window": 2}, "parameters": {"weight": 0.5}}
        made = recipe(models, models=[mean], **keys)
        found, _ = merged(made, tmp_path / "out")
        state = merge(recipe=made).to_model().state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())

    def test_a_stack_becomes_a_model_in_memory_and_no_live_model_of_another_depth(self, models, tmp_path):
        from dapt_merge import ResidentMerger, open_checkpoint
        from dapt_merge.merging import merge

        ranges = [{"sources": [{"model": str(models["one"]), "layer_range": [0, end]}]} for end in (2, 1)]
        made = load_recipe({"merge_method": "passthrough", "slices": ranges})
        found, _ = merged(made, tmp_path / "out")
        model = merge(recipe=made).to_model()
        assert model.config.num_hidden_layers == 3
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in found.items())
        two_layers = merge(str(models["base"]), str(models["one"]), "linear", weight=0.5).to_model()
        merger = ResidentMerger(two_layers, {str(models["one"]): open_checkpoint(models["one"])})
        with pytest.raises(InputError, match="another model than the live one"):
            merger.apply(made)
