"""Scoring: the same numbers as lm-eval, from the current weights, item by item, stored once."""

import numpy as np
import pytest
import torch
from evaluation_cases import QUESTIONS, SENTENCES, make_model, write_jsonl, write_suites

from dapt_merge.errors import InputError
from dapt_merge.evaluation import ItemStore, Scorer, load_suite, standard_error


@pytest.fixture(scope="module")
def reference(model, tokenizer, tmp_path_factory):
    """What lm-eval itself reports for the two tasks, with its own model class."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from dapt_merge.evaluation.tasks import load_tasks

    paths = write_suites(tmp_path_factory.mktemp("reference") / "suites")
    tasks, _ = load_tasks([load_suite(path) for path in paths])
    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float32")
    return evaluate(language_model, {"tasks": {name: task.task for name, task in tasks.items()}}, bootstrap_iters=0)


def test_scores_are_those_that_lm_eval_reports(suites, model, tokenizer, reference):
    items = Scorer(suites, model, tokenizer).score()
    results = reference["results"]
    assert items["texts"].score == pytest.approx(results["texts"]["bits_per_byte,none"], rel=1e-5)
    assert items["quiz"].score == results["quiz"]["acc,none"]
    assert items["quiz:acc_norm"].score == results["quiz"]["acc_norm,none"]


def test_every_log_likelihood_agrees_with_lm_evals_own_model(suites, model, tokenizer, reference):
    scorer = Scorer(suites, model, tokenizer)
    scorer.score()
    expected = [sample["filtered_resps"] for sample in reference["samples"]["quiz"]]
    found: dict[int, list] = {}
    for request in scorer._tasks["quiz"].task.instances:
        found.setdefault(request.doc_id, []).append(request.filtered_resps["none"])
    for ours, theirs in zip(found.values(), expected, strict=True):
        assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], rel=1e-4)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_options_of_a_question_share_one_context(suites, model, tokenizer):
    scorer = Scorer(suites[:1], model, tokenizer, batch_size=1)
    scorer.score()
    scorer.score()
    before = scorer.forward_tokens
    scorer.score()
    packed = scorer.forward_tokens - before
    apart = sum(
        len(tokenizer.encode(request.args[0] + request.args[1])) - 1 for request in scorer._tasks["quiz"].task.instances
    )
    assert packed < 0.7 * apart


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packing_is_used_where_the_model_honours_its_mask(suites, tokenizer, attention):
    scorer = Scorer(suites[:1], make_model(attn_implementation=attention), tokenizer)
    scorer.score()
    assert scorer._language_model._packs is True


def test_a_model_without_4d_masks_is_scored_option_by_option(suites, tokenizer, reference):
    class IgnoresMasks(type(make_model())):
        def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
            return super().forward(input_ids, **kwargs)

    model = make_model()
    model.__class__ = IgnoresMasks
    scorer = Scorer(suites[:1], model, tokenizer)
    assert scorer.score()["quiz"].score == reference["results"]["quiz"]["acc,none"]
    assert scorer._language_model._packs is False


def test_two_runs_with_one_batch_size_are_equal_bit_for_bit(suites, tokenizer):
    model = make_model().to(torch.bfloat16)
    first = Scorer(suites, model, tokenizer, batch_size=3).score()
    second = Scorer(suites, model, tokenizer, batch_size=3).score()
    for name in first:
        assert np.array_equal(first[name].numerators, second[name].numerators)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_batch_size_changes_rounding_only(suites, model, tokenizer, batch_size):
    reference = Scorer(suites, model, tokenizer, batch_size=8).score()
    other = Scorer(suites, model, tokenizer, batch_size=batch_size).score()
    for name in reference:
        assert other[name].numerators == pytest.approx(reference[name].numerators, rel=1e-5)


def test_the_current_weights_are_scored(suites, tokenizer):
    model = make_model()
    scorer = Scorer(suites, model, tokenizer)
    before = scorer.score()["texts"]
    with torch.no_grad():
        model.model.norm.weight.mul_(0.5)
    after = scorer.score()["texts"]
    assert before.item_ids == after.item_ids
    assert not np.allclose(before.numerators, after.numerators)


def test_texts_longer_than_the_model_are_scored_whole_in_windows(suites, model, tokenizer):
    items = Scorer(suites[1:], model, tokenizer, max_length=16).score()["texts"]
    assert items.denominators.sum() == sum(len(sentence.encode()) for sentence in SENTENCES)


def test_questions_that_do_not_fit_are_counted_as_truncated(suites, model, tokenizer):
    scorer = Scorer(suites[:1], model, tokenizer, max_length=18)
    scorer.score()
    assert scorer.truncated["quiz"] > 0


def test_items_do_not_depend_on_the_order_of_the_file(tmp_path, model, tokenizer):
    scores = []
    for name, questions in (("forwards", QUESTIONS), ("backwards", QUESTIONS[::-1])):
        domain, _ = write_suites(tmp_path / name)
        write_jsonl(tmp_path / name / "tasks" / "quiz.jsonl", questions)
        scores.append(Scorer([load_suite(domain)], model, tokenizer).score()["quiz"])
    assert scores[0].item_ids == scores[1].item_ids
    assert scores[0].version == scores[1].version
    assert np.array_equal(scores[0].numerators, scores[1].numerators)


def test_stored_tasks_are_not_scored_again_and_come_back_equal(suites, model, tokenizer, tmp_path):
    store = ItemStore(tmp_path / "items.sqlite")
    first = Scorer(suites, model, tokenizer).score("key", store)
    scorer = Scorer(suites, model, tokenizer)
    again = scorer.score("key", store)
    assert scorer.forward_tokens == 0
    assert list(again) == list(first)
    for name in first:
        assert again[name].score == first[name].score
        assert standard_error(again[name]) == standard_error(first[name])


def test_a_killed_run_leaves_its_finished_tasks(suites, model, tokenizer, tmp_path):
    store = ItemStore(tmp_path / "items.sqlite")

    def die_in_the_second_task(done, total):
        if done > len(QUESTIONS):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Scorer(suites, model, tokenizer).score("key", store, die_in_the_second_task)
    scorer = Scorer(suites, model, tokenizer)
    assert store.get("key", "quiz", scorer.versions["quiz"]) is not None
    assert store.get("key", "texts", scorer.versions["texts"]) is None
    resumed = scorer.score("key", store)
    whole = Scorer(suites, model, tokenizer).score()
    assert resumed["texts"].score == whole["texts"].score


def test_another_dtype_is_not_served_from_the_store(suites, tokenizer, tmp_path):
    store = ItemStore(tmp_path / "items.sqlite")
    Scorer(suites, make_model(), tokenizer).score("key", store)
    scorer = Scorer(suites, make_model().to(torch.bfloat16), tokenizer)
    scorer.score("key", store)
    assert scorer.forward_tokens > 0


def test_progress_counts_items_and_ends_at_the_total(suites, model, tokenizer):
    calls: list[tuple[int, int]] = []
    scorer = Scorer(suites, model, tokenizer, batch_size=1)
    scorer.score(on_progress=lambda done, total: calls.append((done, total)))
    done = [count for count, _ in calls]
    assert done == sorted(done)
    assert calls[-1] == (scorer.item_count, scorer.item_count)
    assert scorer.item_count == len(QUESTIONS) + len(SENTENCES)


def test_a_limit_scores_the_first_documents_under_another_version(suites, model, tokenizer):
    limited = Scorer(suites, model, tokenizer, limit=2).score()
    assert len(limited["quiz"]) == 2
    assert limited["quiz"].version != Scorer(suites, model, tokenizer).versions["quiz"]


def test_weights_that_are_not_finite_are_refused(suites, tokenizer):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        Scorer(suites[1:], model, tokenizer).score()


def test_a_store_needs_a_model_key(suites, model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="model key"):
        Scorer(suites, model, tokenizer).score(store=ItemStore(tmp_path / "items.sqlite"))


def test_nothing_is_printed(suites, model, tokenizer, capfd):
    Scorer(suites, model, tokenizer).score()
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""
