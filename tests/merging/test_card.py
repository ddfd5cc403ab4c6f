"""The model card says what was done, from the report alone, and leaves out what is not known."""

import json

import pytest
import yaml
from merging_models import load_weights, save_model

from dapt_merge import make_recipe, merge, open_checkpoint, plan_merge
from dapt_merge.merging.card import CardScore, hub_id, model_card


def written(models, tmp_path, method="linear", **parameters):
    report = merge(models["base"], models["one"], method, **parameters).save(tmp_path / "out")
    return report, (tmp_path / "out" / "README.md").read_text()


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads(models, tmp_path):
    _, card = written(models, tmp_path, weight=0.5)
    assert card.startswith("---\n")
    assert front_matter(card) == {"library_name": "transformers", "tags": ["merge", "dapt-merge"]}
    assert "2 of 2 inputs were no hub models" in card


def test_recipe_fingerprints_and_versions_are_those_of_the_report(models, tmp_path):
    report, card = written(models, tmp_path, weight=0.5)
    assert report.recipe.rstrip() in card
    for text in (*report.inputs.values(), report.output, report.fingerprint, f"torch {report.versions['torch']}"):
        assert text in card


def test_rounding_loss_fallbacks_and_warnings_are_told(models, tmp_path):
    report, card = written(models, tmp_path, "slerp", t=0.5, out_dtype="bfloat16", dot_threshold=0.9)
    assert f"fallbacks: {report.fallbacks} tensors (linear)" in card
    assert f"rounding loss: {report.lost_share:.1%}" in card
    assert report.warnings
    assert all(warning in card for warning in report.warnings)


def test_no_score_licence_or_language_is_made_up(models, tmp_path):
    _, card = written(models, tmp_path, weight=0.5)
    assert "None are known" in card
    assert not {"license", "language", "model-index", "base_model"} & front_matter(card).keys()


def test_known_scores_come_with_their_error_and_their_note(models):
    plan = plan_merge(make_recipe(str(models["base"]), [str(models["one"])], "linear", weight=0.5))
    report = merge(recipe=plan.recipe).report()
    scores = [CardScore("french|medical", "acc", 0.5, 0.0125, 2.0, "points"), CardScore("general", "acc", 0.25, None)]
    card = model_card(report, plan.checkpoints, scores=scores, scores_note="On the items that chose the merge.")
    assert "| french\\|medical | acc | 0.5000 ± 0.0125 | +2.0000 points |" in card
    assert "| general | acc | 0.2500 |  |" in card
    assert "On the items that chose the merge." in card


def test_the_hub_reads_the_front_matter_as_a_model_card_with_its_scores(models, tmp_path):
    from huggingface_hub import ModelCard

    snapshot = tmp_path / "models--org--base" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(models["base"])
    report = merge(models["base"], models["one"], "linear", weight=0.5).report()
    checkpoints = {"org/base": open_checkpoint(snapshot), "dapt": open_checkpoint(models["one"])}
    scores = [CardScore("domain-fr", "bits_per_byte", 0.75, 0.01), CardScore("general", "acc", 0.25, None)]
    card = ModelCard(model_card(report, checkpoints, scores=scores), ignore_metadata_errors=False)
    assert card.data.base_model == ["org/base"]
    assert card.data.to_dict()["base_model_relation"] == "merge"
    found = [(e.dataset_name, e.metric_type, e.metric_value, e.task_type) for e in card.data.eval_results]
    assert found == [
        ("domain-fr", "bits_per_byte", 0.75, "text-generation"),
        ("general", "acc", 0.25, "text-generation"),
    ]
    assert card.text.lstrip().startswith("# Merge by linear")


def test_what_the_checkpoints_say_of_their_training_is_told_without_folders(models, tmp_path):
    from huggingface_hub import ModelCard

    folder = save_model(tmp_path / "run" / "checkpoint-8", load_weights(models["one"]))
    sources = [
        {"path": "/home/someone/private/notes.jsonl", "role": "domain", "language": "fr", "licence": "CC0"},
        {"hub": "org/replay", "role": "replay"},
    ]
    details = {"tokens_seen": 12_000, "config": {"corpus": sources}}
    (folder / "dapt_checkpoint.json").write_text(json.dumps(details))
    merge(models["base"], folder, "linear", weight=0.5).save(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.datasets, card.data.language) == (["org/replay"], ["fr"])
    assert "12,000 tokens of `notes.jsonl` (domain, fr, CC0), `org/replay` (replay)" in text
    assert "private" not in text


@pytest.mark.parametrize("details", ["", "[]", "{}", '{"config": {"corpus": "x"}}', '{"config": {"corpus": [1]}}'])
def test_training_details_of_any_form_leave_the_merge_alone(models, tmp_path, details):
    folder = save_model(tmp_path / "odd", load_weights(models["one"]))
    (folder / "dapt_checkpoint.json").write_text(details)
    merge(models["base"], folder, "linear", weight=0.5).save(tmp_path / "out")
    assert not {"datasets", "language"} & front_matter((tmp_path / "out" / "README.md").read_text()).keys()


def test_equal_merges_have_equal_cards(models, tmp_path):
    one, two = (written(models, tmp_path / name, weight=0.5)[1] for name in ("first", "second"))
    assert one == two


def test_a_hub_model_is_named_by_its_id_and_a_folder_is_not(models, tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(models["base"])
    assert hub_id("org/name", open_checkpoint(snapshot)) == "org/name"
    assert hub_id(str(models["base"]), open_checkpoint(models["base"])) is None
    assert hub_id("org/name", open_checkpoint(load_weights(models["base"]))) is None
