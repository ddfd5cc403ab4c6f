"""The item store: whole tasks, the right version, several processes."""

import multiprocessing
import sqlite3

import numpy as np
import pytest

from dapt_merge.errors import InputError
from dapt_merge.evaluation import ItemStore, TaskItems


def record(score=0.5, *, task="t", version="1", metric="acc", ids=("b", "a", "c")):
    return TaskItems(task, version, metric, True, ids, np.array([score, 0.1, 0.2]), np.array([1.0, 2.0, 3.0]))


def put_many(path, worker):
    store = ItemStore(path)
    for number in range(20):
        store.put(f"model-{worker}-{number}", [record(number, task=f"task-{number % 3}")])


def test_a_record_comes_back_as_it_was_put(tmp_path):
    store = ItemStore(tmp_path / "items.sqlite")
    store.put("key", [record(), record(0.9, metric="acc_norm")])
    found = store.get("key", "t", "1")
    assert found is not None
    assert dict(zip(found.item_ids, found.numerators, strict=True)) == {"b": 0.5, "a": 0.1, "c": 0.2}
    assert found.denominators.sum() == 6.0
    assert (found.metric, found.higher_is_better) == ("acc", True)
    assert [item.metric for item in store.get_all("key", "t", "1")] == ["acc", "acc_norm"]
    assert store.get("key", "t", "1", "acc_norm").score == pytest.approx(1.2 / 6)


@pytest.mark.parametrize(("key", "task", "version"), [("other", "t", "1"), ("key", "u", "1"), ("key", "t", "2")])
def test_another_model_task_or_version_is_not_found(tmp_path, key, task, version):
    store = ItemStore(tmp_path / "items.sqlite")
    store.put("key", record())
    assert store.get(key, task, version) is None


def test_scoring_settings_are_kept_apart_and_the_last_ones_win(tmp_path):
    store = ItemStore(tmp_path / "items.sqlite")
    store.put("key", record(0.5), settings="float32")
    store.put("key", record(0.7), settings="bfloat16")
    assert store.get("key", "t", "1", settings="float32").numerators.max() == 0.5
    assert store.get("key", "t", "1").numerators.max() == 0.7
    assert store.get("key", "t", "1", settings="float16") is None


def test_a_record_put_again_replaces_the_first(tmp_path):
    store = ItemStore(tmp_path / "items.sqlite")
    store.put("key", [record(0.5), record(0.5, metric="acc_norm")])
    store.put("key", record(0.6))
    assert [item.numerators.max() for item in store.get_all("key", "t", "1")] == [0.6]


def test_a_put_is_whole_or_not_at_all(tmp_path):
    store = ItemStore(tmp_path / "items.sqlite")
    with pytest.raises(InputError, match="cannot be used"):
        store.put("key", [record(), record(0.9)])
    assert store.get("key", "t", "1") is None
    assert store.model_keys() == ()


def test_other_items_under_one_version_are_refused(tmp_path):
    store = ItemStore(tmp_path / "items.sqlite")
    store.put("key", record())
    with pytest.raises(InputError, match="other items under the same task version"):
        store.put("key-2", record(ids=("x", "y", "z")))


def test_several_processes_write_at_once_and_nothing_is_lost(tmp_path):
    path = tmp_path / "items.sqlite"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=put_many, args=(path, worker)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    store = ItemStore(path)
    assert len(store.model_keys()) == 80
    assert store.get("model-3-19", "task-1", "1").numerators.max() == 19


def test_a_file_that_is_no_store_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to be taken for one " * 50)
    with pytest.raises(InputError, match="cannot be used"):
        ItemStore(path)


def test_a_store_of_another_layout_is_refused(tmp_path):
    path = tmp_path / "items.sqlite"
    ItemStore(path)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(InputError, match="layout 99"):
        ItemStore(path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="folder of the store"):
        ItemStore(tmp_path / "nowhere" / "items.sqlite")
