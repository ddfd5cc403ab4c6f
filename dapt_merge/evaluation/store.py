"""Per-item scores on disk: what has been scored once is never scored again.

The idea: one SQLite file holds the item scores of many models. A row is found by the model's key (a fingerprint of its
recipe or weights), the task, the task's version (which changes with the data, the prompts and the settings of the task)
and the scoring settings (dtype, maximum length, tokenizer), so that nothing stale is ever returned. A model's task is
written in one transaction: a killed run leaves whole tasks. Several processes may read and write at once (write-ahead
log; a writer waits for another). Item ids are kept once for each task version, not once for each model.
This module does not know how scores come about.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from dapt_merge.errors import DaptMergeError, InputError
from dapt_merge.evaluation.items import TaskItems

_LAYOUT = 1
_WAIT_SECONDS = 120.0
_TABLES = """
CREATE TABLE IF NOT EXISTS item_sets (
  task TEXT NOT NULL, version TEXT NOT NULL, item_ids TEXT NOT NULL,
  PRIMARY KEY (task, version)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores (
  model_key TEXT NOT NULL, task TEXT NOT NULL, version TEXT NOT NULL, settings TEXT NOT NULL, metric TEXT NOT NULL,
  higher_is_better INTEGER NOT NULL, numerators BLOB NOT NULL, denominators BLOB NOT NULL,
  written TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
  PRIMARY KEY (model_key, task, version, settings, metric)
);
"""


class ItemStore:
    """Item scores of many models in one SQLite file, created when it does not exist.

    A connection is opened for every call, so that a store may be used from several threads and after a fork.

    Raises:
        InputError: the file is no store, was written by a newer version, or cannot be written.

    Example:
        >>> import tempfile, numpy as np
        >>> quiz = TaskItems("quiz", "1", "acc", True, ("a", "b"), np.array([1.0, 0.0]), np.ones(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = ItemStore(folder + "/items.sqlite")
        ...     store.put("xxh3:0", quiz)
        ...     store.get("xxh3:0", "quiz", "1").score
        0.5
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise InputError("the folder of the store does not exist", where=self.path, remedy="Create the folder.")
        with self._connection() as connection:
            layout = connection.execute("PRAGMA user_version").fetchone()[0]
            if layout not in (0, _LAYOUT):
                raise InputError(
                    f"the store has layout {layout}, this version knows layout {_LAYOUT}",
                    where=self.path,
                    remedy="Use the version of dapt-merge that wrote it, or another file.",
                )
            if layout == 0:
                self._create_tables(connection)

    def put(self, model_key: str, items: TaskItems | Sequence[TaskItems], *, settings: str = "") -> None:
        """Write one model's records of one task (one for each metric) in one transaction, replacing earlier ones.

        Raises:
            InputError: the records are of several tasks or versions.
        """
        records = [items] if isinstance(items, TaskItems) else list(items)
        if len({(record.task, record.version, record.item_ids) for record in records}) != 1:
            raise InputError("one put takes the metrics of one task and version")
        first = records[0]
        ids = json.dumps(sorted(first.item_ids))
        with self._connection() as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT OR IGNORE INTO item_sets VALUES (?, ?, ?)", (first.task, first.version, ids))
            stored = connection.execute(
                "SELECT item_ids FROM item_sets WHERE task = ? AND version = ?", (first.task, first.version)
            ).fetchone()[0]
            if stored != ids:
                raise InputError(
                    "the store holds other items under the same task version",
                    where=f"{self.path}, task {first.task}, version {first.version}",
                )
            connection.execute(
                "DELETE FROM scores WHERE model_key = ? AND task = ? AND version = ? AND settings = ?",
                (model_key, first.task, first.version, settings),
            )
            connection.executemany(
                "INSERT INTO scores (model_key, task, version, settings, metric, higher_is_better, numerators,"
                " denominators) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [_row(model_key, settings, record) for record in records],
            )

    def get(
        self, model_key: str, task: str, version: str, metric: str | None = None, *, settings: str | None = None
    ) -> TaskItems | None:
        """Return the record of one metric (None: the task's first), or None when there is none."""
        records = self.get_all(model_key, task, version, settings=settings)
        return next((record for record in records if metric in (None, record.metric)), None)

    def get_all(self, model_key: str, task: str, version: str, *, settings: str | None = None) -> tuple[TaskItems, ...]:
        """Return the records of all metrics of one task, the first metric first; empty when there are none.

        `settings=None` takes the scoring settings that were written last.
        """
        query = (
            "SELECT settings, metric, higher_is_better, numerators, denominators FROM scores"
            " WHERE model_key = ? AND task = ? AND version = ? ORDER BY rowid DESC"
        )
        with self._connection() as connection:
            ids = connection.execute(
                "SELECT item_ids FROM item_sets WHERE task = ? AND version = ?", (task, version)
            ).fetchone()
            rows = connection.execute(query, (model_key, task, version)).fetchall()
        if not rows:
            return ()
        wanted = rows[0][0] if settings is None else settings
        item_ids = tuple(json.loads(ids[0]))
        found = [
            TaskItems(
                task, version, metric, bool(higher), item_ids, np.frombuffer(top, "<f8"), np.frombuffer(low, "<f8")
            )
            for row_settings, metric, higher, top, low in rows
            if row_settings == wanted
        ]
        return tuple(reversed(found))

    def model_keys(self) -> tuple[str, ...]:
        """Return the keys of all models with at least one scored task, sorted."""
        with self._connection() as connection:
            rows = connection.execute("SELECT DISTINCT model_key FROM scores ORDER BY model_key").fetchall()
        return tuple(key for (key,) in rows)

    def _create_tables(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {_LAYOUT}; COMMIT;")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=_WAIT_SECONDS, isolation_level=None)) as connection:
                yield connection
        except sqlite3.DatabaseError as error:
            message = str(error)
            if "locked" in message:
                raise DaptMergeError(
                    f"another process has held the store for {_WAIT_SECONDS:.0f} seconds",
                    where=self.path,
                    remedy="Run the same command again when it is done; finished tasks are kept.",
                ) from error
            raise InputError(
                f"the store cannot be used: {message}",
                where=self.path,
                remedy="Name a store that this tool wrote, or a new file in a folder that you may write to.",
            ) from error


def _row(model_key: str, settings: str, record: TaskItems) -> tuple[object, ...]:
    # Sorted by item id, as the ids are kept, so that one list of ids serves every model.
    order = np.argsort(np.asarray(record.item_ids))
    return (
        model_key,
        record.task,
        record.version,
        settings,
        record.metric,
        int(record.higher_is_better),
        record.numerators[order].astype("<f8").tobytes(),
        record.denominators[order].astype("<f8").tobytes(),
    )
