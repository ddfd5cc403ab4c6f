"""From `dapt-merge statistics` to a fisher or regmean merge: files, recipes, fingerprints, warnings."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dapt_merge.cli import build_app
from dapt_merge.errors import InputError
from dapt_merge.merging import merge, merge_to_disk, plan_merge
from dapt_merge.merging.live import model_from_config
from dapt_merge.merging.resident import ResidentMerger
from dapt_merge.recipe import load_recipe, recipe_fingerprint
from dapt_merge.statistics import open_statistics


def call(*arguments):
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(models, corpus, tmp_path_factory):
    """Return kind → one statistics file for each model, made by the command."""
    folder = tmp_path_factory.mktemp("statistics")
    found = {}
    for kind in ("fisher", "gram"):
        found[kind] = [folder / f"{model.name}-{kind}.safetensors" for model in models]
        for model, out in zip(models, found[kind], strict=True):
            result = call("statistics", model, "--corpus", corpus, "--tokens", 60, "--kind", kind, "-o", out, "--json")
            assert result.exit_code == 0, result.output
            report = json.loads(result.stdout)
            assert (report["kind"], report["tokens"]) == (kind, "60")
    return found


def recipe_of(models, paths, method, key, **parameters):
    entries = [{"model": str(m), "parameters": {key: str(p)}} for m, p in zip(models, paths, strict=True)]
    return {"merge_method": method, "models": entries, "parameters": parameters}


def test_a_fisher_merge_is_the_formula_on_every_tensor(models, files):
    weights = [load_file(model / "model.safetensors") for model in models]
    information = [load_file(path) for path in files["fisher"]]
    merged = merge(recipe=recipe_of(models, files["fisher"], "fisher", "fisher"))
    assert set(merged) == set(weights[0])
    for name in merged:
        shares = [part[name].double() for part in information]
        total = shares[0] + shares[1]
        plain = torch.full_like(total, 0.5)
        first = torch.where(total == 0, plain, shares[0] / total.clamp_min(1e-300))
        expected = first * weights[0][name].double() + (1 - first) * weights[1][name].double()
        torch.testing.assert_close(merged[name].double(), expected, rtol=0, atol=2e-6)
    # a tied head gives every embedding some information, so that no element is left to the plain average
    assert merged.report().notes == {}


def test_a_regmean_merge_is_the_formula_on_linear_layers_and_the_mean_elsewhere(models, files):
    weights = [load_file(model / "model.safetensors") for model in models]
    opened = [open_statistics(path, "gram") for path in files["gram"]]
    grams = [{name: file.stored(name).tensor for name in file.shapes} for file in opened]
    merged = merge(recipe=recipe_of(models, files["gram"], "regmean", "gram", alpha=0.5))
    for name in merged:
        one, two = (part[name].double().numpy() for part in weights)
        expected = (one + two) / 2
        if name in grams[0]:
            scaled = [part[name].double().numpy() for part in grams]
            scaled = [0.5 * matrix + 0.5 * np.diag(np.diag(matrix)) for matrix in scaled]
            expected = (one @ scaled[0] + two @ scaled[1]) @ np.linalg.inv(sum(scaled))
        assert np.abs(merged[name].double().numpy() - expected).max() <= 1e-5 * np.abs(expected).max(), name
    report = merged.report()
    assert report.fallbacks == len(merged) - len(grams[0])
    assert report.warnings == ()


@pytest.mark.parametrize(("method", "key"), [("fisher", "fisher"), ("regmean", "gram")])
def test_disk_and_live_model_give_the_same_bits(models, files, tmp_path, method, key):
    recipe = load_recipe(recipe_of(models, files[key], method, key))
    plan = plan_merge(recipe)
    merge_to_disk(plan, tmp_path / "out")
    live = model_from_config(plan.config_from, torch.float32)
    ResidentMerger(live, plan.checkpoints).apply(recipe)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(live.state_dict()[name], tensor) for name, tensor in stored.items())


def test_layers_with_the_same_input_share_one_matrix_in_the_file(files):
    opened = open_statistics(files["gram"][0], "gram")
    start = "model.layers.1"
    stored = [name for name in load_file(files["gram"][0]) if name.startswith(start)]
    assert len([name for name in opened.shapes if name.startswith(start)]) == 7
    assert stored == [
        f"{start}.{end}.weight" for end in ("mlp.down_proj", "mlp.gate_proj", "self_attn.o_proj", "self_attn.q_proj")
    ]
    for part in ("k_proj", "v_proj"):
        one, other = (f"{start}.self_attn.{name}.weight" for name in ("q_proj", part))
        assert opened.stored(one).is_same_as(opened.stored(other))


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_a_pass_that_was_cut_off_goes_on_to_the_same_numbers(models, corpus, tmp_path, monkeypatch, kind):
    from dapt_merge.statistics import collecting

    whole = collecting.collect_statistics(models[0], corpus, kind, 60, sequence_length=8)
    keep = tmp_path / "kept"
    monkeypatch.setattr(collecting, "_SECONDS_BETWEEN_KEEPING", -1.0)
    seen = []

    def cut_off(done, total):
        seen.append(done)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collecting.collect_statistics(models[0], corpus, kind, 60, sequence_length=8, keep=keep, on_progress=cut_off)
    after = []
    resumed = collecting.collect_statistics(
        models[0], corpus, kind, 60, sequence_length=8, keep=keep, on_progress=lambda done, total: after.append(done)
    )
    assert after[0] == seen[4], "the four that were kept are not read again"
    assert resumed.about == whole.about
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_what_another_pass_kept_is_not_taken_up(models, corpus, tmp_path, monkeypatch):
    from dapt_merge.statistics import collecting

    monkeypatch.setattr(collecting, "_SECONDS_BETWEEN_KEEPING", -1.0)
    keep = tmp_path / "kept"
    collecting.collect_statistics(models[1], corpus, "fisher", 60, keep=keep)
    for content in (keep.read_bytes(), keep.read_bytes()[:50], b""):
        keep.write_bytes(content)
        found = collecting.collect_statistics(models[0], corpus, "fisher", 60, keep=keep)
        expected = collecting.collect_statistics(models[0], corpus, "fisher", 60)
        assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
        collecting.collect_statistics(models[1], corpus, "fisher", 60, keep=keep)


def test_the_command_says_the_size_before_and_leaves_only_the_file(models, corpus, tmp_path):
    result = call("statistics", models[0], "--corpus", corpus, "--tokens", 60, "-o", tmp_path / "new" / "s.safetensors")
    assert result.exit_code == 0, result.output
    assert "fisher: 0.00 GB to write" in result.stderr
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["s.safetensors"]


def test_a_recipe_finds_statistics_beside_it_and_is_named_by_their_content(models, files, tmp_path):
    def fingerprint(folder, paths):
        folder.mkdir()
        for path, name in zip(paths, ("a.safetensors", "b.safetensors"), strict=True):
            (folder / name).write_bytes(path.read_bytes())
        content = recipe_of(models, ["a.safetensors", "b.safetensors"], "fisher", "fisher")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
        recipe = load_recipe(folder / "recipe.yaml")
        return recipe_fingerprint(recipe, {str(model): str(number) for number, model in enumerate(models)})

    one = fingerprint(tmp_path / "one", files["fisher"])
    assert one == fingerprint(tmp_path / "two", files["fisher"])
    assert one != fingerprint(tmp_path / "three", files["fisher"][::-1])


def test_statistics_of_another_model_are_reported(models, files):
    swapped = merge(recipe=recipe_of(models, files["fisher"][::-1], "fisher", "fisher"))
    warnings = swapped.report().warnings
    assert len([warning for warning in warnings if "collected from other weights" in warning]) == 2


def test_files_that_do_not_fit_are_refused_before_anything_is_merged(models, files, tmp_path):
    def plan_with(path, method="fisher", key="fisher"):
        return plan_merge(load_recipe(recipe_of(models, [path, path], method, key)))

    with pytest.raises(InputError, match="holds 'gram', expected 'fisher'"):
        plan_with(files["gram"][0])
    with pytest.raises(InputError, match="no such statistics file"):
        plan_with(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="holds no statistics"):
        plan_with(models[0] / "model.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(files["fisher"][0].read_bytes()[:100])
    with pytest.raises(InputError, match="truncated"):
        plan_with(tmp_path / "cut.safetensors")
    about = dict(open_statistics(files["gram"][0], "gram").about)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({name: torch.eye(3)}, tmp_path / "small.safetensors", about)
    with pytest.raises(InputError, match=r"are \(3, 3\), expected \(16, 16\)"):
        plan_with(tmp_path / "small.safetensors", "regmean", "gram")
    save_file({"other.weight": torch.eye(3)}, tmp_path / "other.safetensors", about)
    with pytest.raises(InputError, match="name none of the model's tensors"):
        plan_with(tmp_path / "other.safetensors", "regmean", "gram")


def test_a_model_without_a_file_and_a_list_of_files_are_refused(models, files):
    content = recipe_of(models, files["fisher"], "fisher", "fisher")
    content["models"][1]["parameters"] = {}
    with pytest.raises(InputError, match="needs a value for 'fisher'"):
        load_recipe(content)
    content["parameters"] = {"fisher": [str(path) for path in files["fisher"]]}
    with pytest.raises(InputError, match="between files there is no gradient"):
        load_recipe(content)
    content["parameters"] = {"fisher": 0.5}
    with pytest.raises(InputError, match="expected the path of a file"):
        load_recipe(content)


def test_the_command_refuses_what_it_cannot_write(models, corpus, tmp_path):
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"")
    arguments = ("statistics", models[0], "--corpus", corpus, "--tokens", 20, "--kind", "fisher", "-o")
    assert "exists already" in str(call(*arguments, there).exception)
    assert "there.safetensors" in str(call(*arguments, tmp_path / "there.pt").exception)
    assert there.read_bytes() == b""
    assert call(*arguments, there, "--overwrite").exit_code == 0
    assert open_statistics(there, "fisher").about["sequences"] == "1"
    assert not list(tmp_path.glob(".*"))


def test_a_short_corpus_is_told(models, corpus, tmp_path):
    result = call("statistics", models[0], "--corpus", corpus, "--kind", "gram", "-o", tmp_path / "s.safetensors")
    assert result.exit_code == 0
    assert "of the 100,000 tokens asked for" in result.output


def test_arguments_give_the_base_its_file_first(models, files, tmp_path):
    expected = merge(recipe=recipe_of(models, files["fisher"], "fisher", "fisher"))
    base, dapt = map(str, models)
    merged = merge(base, dapt, "fisher", fisher=[str(path) for path in files["fisher"]])
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    heavier = merge(base, dapt, "fisher", fisher=[str(path) for path in files["fisher"]], weight=3.0)
    assert [entry.parameters.get("weight") for entry in heavier.plan.recipe.models] == [None, 3.0]
    listed = ",".join(str(path) for path in files["gram"])
    flags = ("--base", base, "--dapt", dapt, "--method", "regmean", f"gram=[{listed}]", "-o", tmp_path / "out")
    assert call("merge", *flags).exit_code == 0
    with pytest.raises(InputError, match="needs a value for 'fisher'"):
        merge(base, dapt, "fisher", fisher=str(files["fisher"][1]))
