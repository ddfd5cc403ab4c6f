"""Suites and tasks: what is read, and what is said when it cannot be."""

import pytest
from evaluation_cases import CHOICE, QUESTIONS, ROLLING, write_jsonl, write_suites

from dapt_merge.errors import InputError
from dapt_merge.evaluation import load_suite
from dapt_merge.evaluation.tasks import item_ids, load_tasks

SUITE = "name: s\naxis: domain\ntasks: [quiz]\ninclude_path: tasks\n"


@pytest.fixture
def folder(tmp_path):
    write_suites(tmp_path)
    return tmp_path


def written(folder, text):
    path = folder / "suite.yaml"
    path.write_text(text)
    return path


def test_include_paths_are_relative_to_the_suite_file(folder, monkeypatch):
    monkeypatch.chdir("/")
    suite = load_suite(folder / "domain.yaml")
    assert suite.include_path == [(folder / "tasks").resolve()]
    assert (suite.name, suite.axis, suite.tasks, suite.language) == ("questions", "domain", ["quiz"], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SUITE + "langage: fr\n", "unknown key 'langage'. Did you mean 'language'"),
        (SUITE.replace("domain", "medical"), "axis: .*'domain' or 'general'"),
        (SUITE.replace("name: s\n", ""), "the key 'name' is missing"),
        (SUITE.replace("[quiz]", "[]"), "at least one task"),
        (SUITE.replace("[quiz]", "[quiz, quiz]"), "listed twice: quiz"),
        (SUITE.replace("[quiz]", "quiz"), "tasks: .*list"),
        (SUITE.replace("path: tasks", "path: taks"), "task folder does not exist"),
        ("- quiz\n", "not a suite: expected a mapping of keys to values, found list"),
        ("name: [", "not valid YAML"),
    ],
)
def test_a_broken_suite_says_what_is_wrong(folder, text, message):
    with pytest.raises(InputError, match=message):
        load_suite(written(folder, text))


def test_a_missing_suite_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file") as caught:
        load_suite(tmp_path / "absent.yaml")
    assert "absent.yaml" in str(caught.value)


def test_data_files_are_relative_to_the_tasks_yaml(folder, monkeypatch):
    monkeypatch.chdir("/")
    tasks, members = load_tasks([load_suite(folder / "domain.yaml")])
    assert members == {"questions": ("quiz",)}
    assert len(tasks["quiz"].documents) == len(QUESTIONS)


def test_a_task_group_and_a_tag_stand_for_their_tasks(folder):
    (folder / "tasks" / "all.yaml").write_text("group: everything\ntask: [quiz, texts]\n")
    (folder / "tasks" / "quiz.yaml").write_text(CHOICE + "tag: asked\n")
    _, members = load_tasks([load_suite(written(folder, SUITE.replace("[quiz]", "[everything]")))])
    assert set(members["s"]) == {"quiz", "texts"}
    _, members = load_tasks([load_suite(written(folder, SUITE.replace("[quiz]", "[asked]")))])
    assert members["s"] == ("quiz",)


@pytest.mark.slow
def test_a_task_nobody_knows_is_named_with_its_nearest(folder):
    with pytest.raises(InputError, match=r"no task 'quizz'.*Did you mean 'quiz'"):
        load_tasks([load_suite(written(folder, SUITE.replace("[quiz]", "[quizz]")))])


def test_a_task_file_that_does_not_parse_is_named(folder):
    (folder / "tasks" / "quiz.yaml").write_text("task: quiz\n  broken: [")
    with pytest.raises(InputError, match="task file cannot be read") as caught:
        load_tasks([load_suite(folder / "domain.yaml")])
    assert caught.value.where == str((folder / "tasks" / "quiz.yaml").resolve())


def test_an_empty_data_file_is_refused(folder):
    (folder / "tasks" / "quiz.jsonl").write_text("\n")
    with pytest.raises(InputError, match="data file is empty"):
        load_tasks([load_suite(folder / "domain.yaml")])


def test_a_missing_data_file_is_refused(folder):
    (folder / "tasks" / "quiz.jsonl").unlink()
    with pytest.raises(InputError, match="data file does not exist"):
        load_tasks([load_suite(folder / "domain.yaml")])


def test_a_broken_line_of_data_is_located(folder):
    path = folder / "tasks" / "quiz.jsonl"
    path.write_text(path.read_text() + '{"question": \n')
    with pytest.raises(InputError, match="not a line of JSON") as caught:
        load_tasks([load_suite(folder / "domain.yaml")])
    assert caught.value.where.endswith(f"line {len(QUESTIONS) + 1}")


def test_documents_that_do_not_fit_the_template_are_refused(folder):
    write_jsonl(folder / "tasks" / "quiz.jsonl", [{"question": "q", "options": ["a", "b"], "answer": 0}])
    with pytest.raises(InputError, match="task 'quiz'"):
        load_tasks([load_suite(folder / "domain.yaml")])


def test_one_task_name_in_two_files_is_refused(folder, tmp_path):
    write_suites(tmp_path / "second")
    other = load_suite(tmp_path / "second" / "domain.yaml").model_copy(update={"name": "other"})
    with pytest.raises(InputError, match="defined in two files"):
        load_tasks([load_suite(folder / "domain.yaml"), other])


def test_two_suites_of_one_name_are_refused(folder):
    suite = load_suite(folder / "domain.yaml")
    with pytest.raises(InputError, match="two suites are named"):
        load_tasks([suite, suite])


def version(folder):
    tasks, _ = load_tasks([load_suite(folder / "domain.yaml")])
    return tasks["quiz"].version


def test_the_version_changes_with_data_prompt_or_metric_and_with_nothing_else(folder, tmp_path):
    task, data = folder / "tasks" / "quiz.yaml", folder / "tasks" / "quiz.jsonl"
    before = version(folder)
    assert before.startswith("2.0+")
    write_suites(tmp_path / "elsewhere")
    assert version(tmp_path / "elsewhere") == before
    task.write_text(CHOICE.replace("Answer:", "Reply:"))
    prompt = version(folder)
    task.write_text(CHOICE.replace("acc_norm", "acc_bytes"))
    metric = version(folder)
    task.write_text(CHOICE)
    write_jsonl(data, [{**QUESTIONS[0], "answer": 1}, *QUESTIONS[1:]])
    target = version(folder)
    write_jsonl(data, QUESTIONS[1:])
    fewer = version(folder)
    assert len({before, prompt, metric, target, fewer}) == 5


def test_functions_in_a_task_do_not_change_its_version_from_run_to_run(folder):
    (folder / "tasks" / "documents.py").write_text("def keep(documents):\n    return documents\n")
    text = CHOICE + "process_docs: !function documents.keep\n"
    (folder / "tasks" / "quiz.yaml").write_text(text)
    first = version(folder)
    (folder / "tasks" / "documents.py").touch()
    assert version(folder) == first


def test_copies_of_a_document_stay_apart():
    first, second, third = item_ids([{"text": "a"}, {"text": "b"}, {"text": "a"}])
    assert first != second
    assert third == f"{first}#2"


def test_a_metric_that_is_no_mean_over_items_is_refused(folder):
    from evaluation_cases import make_model, make_tokenizer

    from dapt_merge.evaluation import Scorer

    (folder / "tasks" / "texts.yaml").write_text(
        ROLLING.replace("bits_per_byte", "word_perplexity", 1).replace(
            "aggregation: bits_per_byte", "aggregation: weighted_perplexity"
        )
    )
    scorer = Scorer([load_suite(folder / "general.yaml")], make_model(), make_tokenizer())
    with pytest.raises(InputError, match="no metric that is a mean over items"):
        scorer.score()
