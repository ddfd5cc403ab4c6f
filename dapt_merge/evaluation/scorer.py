"""Suites scored on a model in memory, again and again, as its weights change.

The idea: a search rewrites the weights of one resident model for every trial. Tasks, prompts and tokens are prepared
once; `Scorer.score` then runs lm-eval's own steps (requests, filters, `process_results`) on the current weights and
keeps every item's score. Each task is batched by itself, so that its scores do not depend on which other tasks were
found in the store. What this module does not know: merging, and whose weights they are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from dapt_merge.errors import InputError
from dapt_merge.evaluation.items import TaskItems
from dapt_merge.evaluation.store import ItemStore
from dapt_merge.evaluation.suites import Suite

if TYPE_CHECKING:
    from dapt_merge.evaluation.tasks import LoadedTask

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

_NATS_PER_BIT = float(np.log(2))


class Scorer:
    """Scores suites on one model, with the weights that it has when `score` is called.

    Args:
        suites: loaded suites.
        model: a `PreTrainedModel` for causal language modelling; it is put in evaluation mode.
        tokenizer: its tokenizer.
        batch_size: sequences in one forward pass. Scores agree between batch sizes to rounding, and bit for bit between
            two runs with the same one on the same machine.
        max_length: longest sequence in tokens; None takes the model's.
        limit: score only the first documents of each task.

    Attributes:
        suite_tasks: for each suite's name, the names of its tasks (groups and tags resolved).
        versions: for each task's name, its version.
        settings: what else a score depends on (dtype, maximum length, tokenizer), as kept in the store.
        truncated: for each task whose requests did not fit the model, how many were cut on the left at the last call.

    Raises:
        InputError: a suite, a task or its data cannot be used.

    Example:
        >>> scorer = Scorer([load_suite("suites/domain.yaml")], model, tokenizer)  # doctest: +SKIP
        >>> scorer.score()["icd11_fr"].score  # doctest: +SKIP
        1.273
    """

    def __init__(
        self,
        suites: Sequence[Suite],
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        limit: int | None = None,
    ) -> None:
        from dapt_merge.evaluation.tasks import load_tasks, quiet_lm_eval

        if batch_size < 1:
            raise InputError(f"the batch size is {batch_size}, expected at least 1")
        if not suites:
            raise InputError("no suite was given", remedy="Name at least one suite.")
        self._tasks, self.suite_tasks = load_tasks(suites, limit=limit)
        with quiet_lm_eval():
            from dapt_merge.evaluation.language_model import PackedLM

            self._language_model = PackedLM(model, tokenizer, batch_size=batch_size, max_length=max_length)
        self.versions: Mapping[str, str] = {name: task.version for name, task in self._tasks.items()}
        self.settings = _settings(self._language_model)
        self.truncated: dict[str, int] = {}

    @property
    def item_count(self) -> int:
        """Items in all tasks together."""
        return sum(len(task.item_ids) for task in self._tasks.values())

    @property
    def forward_tokens(self) -> int:
        """Tokens that went through the model since this object was made, padding included."""
        return self._language_model.forward_tokens

    def score(
        self, model_key: str | None = None, store: ItemStore | None = None, on_progress: Progress | None = None
    ) -> dict[str, TaskItems]:
        """Score every task with the model's current weights.

        Args:
            model_key: what the weights are known by in the store; needed with a store.
            store: tasks found here under the key are not scored again, and the others are written as they finish.
            on_progress: called with (items done, items in all).

        Returns:
            the score records: each task's first metric under the task's name, further ones under "task:metric".

        Raises:
            InputError: a store without a key; scores that are not finite; a metric that has no value for an item.
        """
        if store is not None and model_key is None:
            raise InputError("a store needs a model key", remedy="Pass the fingerprint of the weights or the recipe.")
        self._language_model.model.eval()
        records: dict[str, TaskItems] = {}
        done = 0
        for task in self._tasks.values():
            found = self._stored(task, model_key, store)
            if not found:
                found = self._score_task(task, _shifted(on_progress, done, len(task.item_ids), self.item_count))
                if store is not None and model_key is not None:
                    store.put(model_key, found, settings=self.settings)
            done += len(task.item_ids)
            if on_progress is not None:
                on_progress(done, self.item_count)
            for place, record in enumerate(found):
                records[task.name if place == 0 else f"{task.name}:{record.metric}"] = record
        return records

    def _stored(self, task: LoadedTask, model_key: str | None, store: ItemStore | None) -> tuple[TaskItems, ...]:
        if store is None or model_key is None:
            return ()
        return store.get_all(model_key, task.name, task.version, settings=self.settings)

    def _score_task(self, task: LoadedTask, on_batch: Progress | None) -> tuple[TaskItems, ...]:
        self._language_model.on_batch = on_batch
        self._language_model.truncated = 0
        try:
            _answer(task, self._language_model)
        except ValueError as error:
            raise InputError(f"task '{task.name}' cannot be scored: {error}") from error
        self.truncated.pop(task.name, None)
        if self._language_model.truncated:
            self.truncated[task.name] = self._language_model.truncated
            logger.warning(
                "task %s: %d requests are longer than %d tokens and were cut on the left",
                task.name,
                self._language_model.truncated,
                self._language_model.max_length,
            )
        return _records(task)


def _answer(task: LoadedTask, language_model: Any) -> None:
    """Put the model's responses into the task's requests, as lm-eval's evaluation loop does."""
    by_kind: dict[str, list[Any]] = {}
    for request in task.task.instances:
        request.resps, request.filtered_resps = [], {}
        by_kind.setdefault(request.request_type, []).extend([request] * request.repeats)
    for kind, requests in by_kind.items():
        for request, response in zip(requests, getattr(language_model, kind)(requests, disable_tqdm=True), strict=True):
            request.resps.append(response)
    task.task.apply_filters()


def _records(task: LoadedTask) -> tuple[TaskItems, ...]:
    """One record for each metric that is a ratio of sums over items; the first filter's, as lm-eval prints it first."""
    requests: dict[int, list[Any]] = {}
    for request in task.task.instances:
        requests.setdefault(request.doc_id, []).append(request)
    filter_name = next(iter(task.task.instances[0].filtered_resps))
    columns: dict[str, list[tuple[float, float]]] = {}
    for index, document in enumerate(task.documents):
        ordered = sorted(requests[index], key=lambda request: request.idx)
        metrics = task.task.process_results(document, [request.filtered_resps[filter_name] for request in ordered])
        for name, value in metrics.items():
            ratio = _as_ratio(name, value)
            if ratio is not None:
                columns.setdefault(name, []).append(ratio)
    whole = {name: column for name, column in columns.items() if len(column) == len(task.documents)}
    if not whole:
        raise InputError(
            f"task '{task.name}' has no metric that is a mean over items",
            remedy="Use bits_per_byte, acc, acc_norm, exact_match or another metric with one number for each item.",
        )
    return tuple(_record(task, name, column) for name, column in whole.items())


def _record(task: LoadedTask, metric: str, column: Sequence[tuple[float, float]]) -> TaskItems:
    # In the order of the ids, as in the store: a score read back is then the same to the last bit.
    order = np.argsort(np.asarray(task.item_ids))
    numerators, denominators = np.asarray(column, dtype=np.float64)[order].T.copy()
    ids = tuple(task.item_ids[index] for index in order)
    higher = bool(task.task.higher_is_better().get(metric, True))
    return TaskItems(task.name, task.version, metric, higher, ids, numerators, denominators)


def _as_ratio(metric: str, value: Any) -> tuple[float, float] | None:
    """Numerator and denominator of one item, or None for a metric that is no ratio of sums (perplexity, F1, …)."""
    if metric == "bits_per_byte":
        nats, size_bytes = value
        return -float(nats) / _NATS_PER_BIT, float(size_bytes)
    if metric in ("perplexity", "word_perplexity", "byte_perplexity"):
        return None
    if isinstance(value, bool | int | float | np.number):
        return float(value), 1.0
    return None


def _settings(language_model: Any) -> str:
    """What scores depend on beside the weights and the tasks, as one short text."""
    tokenizer = language_model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest = xxhash.xxh3_64_hexdigest(text.encode())
    dtype = str(language_model.model.dtype).removeprefix("torch.")
    return f"{dtype},{language_model.max_length},{digest},{language_model.prefix_token_id}"


def _shifted(on_progress: Progress | None, done: int, items: int, total: int) -> Progress | None:
    """Turn a language model's progress through the requests of one task into progress through all items."""
    if on_progress is None:
        return None
    return lambda answered, requests: on_progress(done + items * answered // max(requests, 1), total)
