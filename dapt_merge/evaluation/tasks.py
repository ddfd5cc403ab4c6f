"""lm-eval tasks loaded once, with ids for their items and a version that changes whenever a score could.

The idea: lm-eval owns tasks, prompts and metrics; this module adds what comparing models needs. An item's id is a hash
of its document, so that pairing does not depend on the order of a file. A task's version is the YAML's version and a
hash of its configuration, its rendered prompts and its documents, so that scores of a changed task are never mixed up.
Relative data files in a task's YAML are found beside that YAML. What this module does not know: models.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from dapt_merge.errors import DaptMergeError, InputError, nearest
from dapt_merge.evaluation.suites import Suite

# lm-eval's own default, so that few-shot examples are those of an ordinary lm-eval run.
_FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class LoadedTask:
    """One lm-eval task, ready to be scored.

    Args:
        name: the task's name.
        version: the YAML's version, "+", and a hash of configuration, prompts and documents.
        task: lm-eval's task object; its `instances` are the requests.
        documents: the documents that are scored, in the order of the file.
        item_ids: their content hashes, in the same order.
    """

    name: str
    version: str
    task: Any
    documents: tuple[Any, ...]
    item_ids: tuple[str, ...]


def load_tasks(
    suites: Sequence[Suite], *, limit: int | None = None
) -> tuple[dict[str, LoadedTask], dict[str, tuple[str, ...]]]:
    """Load every task of the suites once and build its requests.

    Args:
        suites: loaded suites; two may share a task.
        limit: score only the first documents of each task; None scores all.

    Returns:
        the tasks by name, and for each suite's name the names of its tasks (groups and tags resolved).

    Raises:
        InputError: a task is unknown or defined twice, its YAML is broken, its data file is missing, empty or broken,
            or two suites have one name.
    """
    if limit is not None and limit < 1:
        raise InputError(f"the limit is {limit}, expected at least 1 item")
    tasks: dict[str, LoadedTask] = {}
    sources: dict[str, str] = {}
    members: dict[str, tuple[str, ...]] = {}
    for suite in suites:
        if suite.name in members:
            raise InputError(f"two suites are named '{suite.name}'", remedy="Give every suite its own name.")
        found = _lm_eval_tasks(suite)
        members[suite.name] = tuple(found)
        for name, task in found.items():
            source = _config_source(task)
            if sources.setdefault(name, source) != source:
                raise InputError(
                    f"task '{name}' is defined in two files: {sources[name]} and {source}",
                    where=f"suite {suite.name}",
                    remedy="Rename one of the two tasks.",
                )
            if name not in tasks:
                tasks[name] = _prepared(name, task, limit)
    return tasks, members


def item_ids(documents: Sequence[Any]) -> tuple[str, ...]:
    """Hash each document's content; the second copy of a document gets the suffix "#2", so that ids stay unique.

    Example:
        >>> first, second, copy = item_ids([{"a": 1, "b": 2}, {"a": 3}, {"b": 2, "a": 1}])
        >>> copy == first + "#2"
        True
    """
    seen: Counter[str] = Counter()
    ids = []
    for document in documents:
        digest = xxhash.xxh3_128_hexdigest(_canonical(document).encode())
        seen[digest] += 1
        ids.append(digest if seen[digest] == 1 else f"{digest}#{seen[digest]}")
    return tuple(ids)


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval's and datasets' progress bars and advice (not their errors) for the time of a block."""
    import datasets

    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _lm_eval_tasks(suite: Suite) -> dict[str, Any]:
    """Load the suite's lm-eval tasks by name, groups and tags resolved to their members."""
    from lm_eval.tasks import TaskManager

    folders: list[str | Path] = list(suite.include_path)
    with quiet_lm_eval():
        manager = TaskManager(include_path=folders, include_defaults=False)
    missing = [name for name in suite.tasks if name not in manager.task_index]
    if missing:
        _refuse_broken_yaml(missing, suite)
        # Indexing the thousands of tasks that lm-eval ships takes seconds, so only when one may be among them.
        with quiet_lm_eval():
            manager = TaskManager(include_path=folders, include_defaults=True)
    for name in missing:
        if name not in manager.task_index:
            raise _unknown_task(name, suite, manager.all_tasks)
    loaded: dict[str, Any] = {}
    for name in suite.tasks:
        _anchor_data_files(manager, name, suite)
        try:
            with quiet_lm_eval():
                loaded.update(manager.load(name)["tasks"])
        except DaptMergeError:
            raise
        except Exception as error:
            # Whatever the YAML or its data trip over inside lm-eval, datasets or jinja: the task's author can mend it.
            cause = error.__cause__ or error
            raise InputError(
                f"lm-eval cannot load task '{name}': {type(cause).__name__}: {_first_line(cause)}",
                where=_source(manager, name),
                remedy="Correct the task's YAML or its data file.",
            ) from error
    return loaded


def _unknown_task(name: str, suite: Suite, known: Sequence[str]) -> InputError:
    folders = ", ".join(str(folder) for folder in suite.include_path) or "none"
    return InputError(
        f"there is no task '{name}' in the suite's folders ({folders}) or in lm-eval.{nearest(name, list(known))}",
        where=f"suite {suite.name}",
        remedy="Correct the name, or add the folder of the task's YAML to include_path.",
    )


def _refuse_broken_yaml(missing: Sequence[str], suite: Suite) -> None:
    """Name the file of a missing task that lm-eval skipped without a word because it does not parse."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(path for folder in suite.include_path for path in folder.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if not any(name in text for name in missing):
            continue
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:
            raise InputError(
                f"the task file cannot be read: {_first_line(error)}",
                where=path,
                remedy="Correct the YAML of the task.",
            ) from error


def _anchor_data_files(manager: Any, name: str, suite: Suite) -> None:
    """Make relative data files of the tasks behind a name relative to their YAML, and check that they hold data."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for entry in _entries_behind(manager, name):
        if entry.yaml_path is None or not any(entry.yaml_path.is_relative_to(folder) for folder in suite.include_path):
            continue
        config = load_yaml(entry.yaml_path)
        data_files = (config.get("dataset_kwargs") or {}).get("data_files")
        if data_files is None:
            continue
        anchored = _anchored(data_files, entry.yaml_path.parent)
        for path in _local_files(anchored):
            _refuse_unusable_data(path, entry.yaml_path, is_json=config.get("dataset_path") == "json")
        config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": anchored}
        config["metadata"] = {**(config.get("metadata") or {}), "yaml": str(entry.yaml_path)}
        # lm-eval reads the YAML again where an entry names one; without it, it takes the configuration given here.
        entry.cfg, entry.yaml_path = config, None


def _entries_behind(manager: Any, name: str) -> list[Any]:
    """Index entries of the tasks that a task, tag or group name stands for."""
    index = manager.task_index
    entry = index.get(name)
    if entry is None:
        return []
    if entry.kind.name == "TAG":
        return [index[task] for task in sorted(entry.tags) if task in index]
    if entry.kind.name == "GROUP":
        members = (entry.cfg or {}).get("task") or []
        names = [member if isinstance(member, str) else member.get("task", "") for member in members]
        return [found for member in names if isinstance(member, str) for found in _entries_behind(manager, member)]
    return [entry]


def _anchored(data_files: Any, folder: Path) -> Any:
    if isinstance(data_files, Mapping):
        return {split: _anchored(files, folder) for split, files in data_files.items()}
    if isinstance(data_files, list):
        return [_anchored(file, folder) for file in data_files]
    text = str(data_files)
    if "://" in text or Path(text).is_absolute():
        return text
    return str((folder / text).resolve())


def _local_files(data_files: Any) -> Iterator[Path]:
    if isinstance(data_files, Mapping):
        data_files = list(data_files.values())
    if isinstance(data_files, list):
        for files in data_files:
            yield from _local_files(files)
    elif "://" not in data_files and "*" not in data_files:
        yield Path(data_files)


def _refuse_unusable_data(path: Path, task_file: Path, *, is_json: bool) -> None:
    if not path.is_file():
        raise InputError(
            f"the task's data file does not exist: {path}",
            where=task_file,
            remedy="Correct dataset_kwargs.data_files; it is relative to the task's YAML.",
        )
    if not is_json or path.suffix != ".jsonl":
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        empty = True
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            empty = False
            try:
                json.loads(line)
            except ValueError as error:
                raise InputError(f"not a line of JSON: {error}", where=f"{path}, line {number}") from error
    if empty:
        raise InputError("the task's data file is empty", where=path, remedy="Write one JSON document per line.")


def _prepared(name: str, task: Any, limit: int | None) -> LoadedTask:
    """Build a task's requests as lm-eval's own loop does, and give its items and itself their identities."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    try:
        with quiet_lm_eval():
            task.build_all_requests(limit=limit, rank=0, world_size=1)
            documents = tuple(document for _, document in task.doc_iterator(limit=limit, rank=0, world_size=1))
    except Exception as error:
        raise InputError(
            f"lm-eval cannot build the prompts of task '{name}': {type(error).__name__}: {_first_line(error)}",
            where=_config_source(task),
            remedy="Check doc_to_text, doc_to_target and doc_to_choice against the documents.",
        ) from error
    ids = item_ids(documents)
    return LoadedTask(name, _version(task, ids), task, documents, ids)


def _version(task: Any, ids: Sequence[str]) -> str:
    config = dict(task.dump_config())
    # Where files lie does not change a score; what is in them is in the prompts and the item ids.
    for key in ("metadata", "dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "tag", "task_alias"):
        config.pop(key, None)
    requests = sorted((ids[request.doc_id], request.idx, _canonical(request.arguments)) for request in task.instances)
    targets = sorted((item, str(task.doc_to_target(request.doc))) for item, request in _first_requests(task, ids))
    # Functions of a task are dumped as their source, or, deep inside, as a name and an address that changes by the run.
    text = re.sub(r" at 0x[0-9a-f]+", "", _canonical([config, requests, targets]))
    digest = xxhash.xxh3_64_hexdigest(text.encode())
    declared = (task.config.metadata or {}).get("version", 0)
    return f"{declared}+{digest}"


def _first_requests(task: Any, ids: Sequence[str]) -> Iterator[tuple[str, Any]]:
    return ((ids[request.doc_id], request) for request in task.instances if request.idx == 0)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _config_source(task: Any) -> str:
    metadata = task.config.metadata or {}
    return str(metadata.get("yaml") or metadata.get("config_source") or task.task_name)


def _source(manager: Any, name: str) -> str:
    entry = manager.task_index[name]
    return str(entry.yaml_path or ((entry.cfg or {}).get("metadata") or {}).get("yaml") or name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
