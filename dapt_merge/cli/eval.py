"""`dapt-merge eval`: per-item scores of models on suites, as a table of score ± standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from dapt_merge.evaluation import TaskItems


def eval(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Model folders or hub ids.")],
    suite: Annotated[list[Path], typer.Option("--suite", help="Suite YAML; repeat for several.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first N items of each task.")] = None,
    store: Annotated[Path | None, typer.Option(help="SQLite file that keeps item scores and is read first.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in one forward pass.")] = 8,
    max_length: Annotated[int | None, typer.Option(min=2, help="Longest sequence in tokens (the model's).")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer for all models (each model's own).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Score models on suites of lm-eval tasks, item by item."""
    from dapt_merge.cli.console import console, output, print_json, progress
    from dapt_merge.evaluation import ItemStore, load_suite
    from dapt_merge.evaluation.runner import make_scorer, weights_key

    suites = [load_suite(path) for path in suite]
    opened = ItemStore(store) if store is not None else None
    results: dict[str, Any] = {}
    items: dict[str, Mapping[str, TaskItems]] = {}
    members: Mapping[str, Sequence[str]] = {}
    for model in models:
        scorer = make_scorer(
            model,
            suites,
            tokenizer=tokenizer,
            dtype=dtype,
            batch_size=batch_size,
            max_length=max_length,
            limit=limit,
        )
        key = weights_key(model) if opened is not None else None
        with progress(f"scoring {model}", "items") as on_progress:
            items[model] = scorer.score(key, opened, on_progress)
        members = scorer.suite_tasks
        for task, requests in scorer.truncated.items():
            console.print(f"warning: {model}: {requests} requests of task {task} were too long and cut on the left")
        results[model] = {
            "key": key,
            "truncated": scorer.truncated,
            "suites": {name: _suite_result(items[model], tasks) for name, tasks in members.items()},
        }
    if json:
        axes = {loaded.name: {"axis": loaded.axis, "language": loaded.language} for loaded in suites}
        print_json({"suites": axes, "limit": limit, "models": results})
        return
    for loaded in suites:
        output.print(
            _table(f"{loaded.name} ({loaded.axis})", {name: results[name]["suites"][loaded.name] for name in results})
        )


def _suite_result(items: Mapping[str, TaskItems], tasks: Sequence[str]) -> dict[str, Any]:
    """Scores of one model on one suite: every task and metric, and the mean of each metric that all tasks share."""
    from dapt_merge.evaluation import standard_error, suite_score, suite_standard_error

    rows = [record for record in items.values() if record.task in tasks]
    shared = [metric for metric in dict.fromkeys(row.metric for row in rows) if _in_all(rows, tasks, metric)]
    return {
        "tasks": [
            {
                "task": row.task,
                "metric": row.metric,
                "score": row.score,
                "standard_error": standard_error(row),
                "items": len(row),
                "version": row.version,
                "higher_is_better": row.higher_is_better,
            }
            for row in rows
        ],
        "mean": [
            {
                "metric": metric,
                "score": suite_score(items, tasks, metric),
                "standard_error": suite_standard_error(items, tasks, metric),
                "items": sum(len(row) for row in rows if row.metric == metric),
            }
            for metric in shared
        ],
    }


def _in_all(rows: Sequence[TaskItems], tasks: Sequence[str], metric: str) -> bool:
    return {row.task for row in rows if row.metric == metric} == set(tasks)


def _table(title: str, results: Mapping[str, Any]) -> Table:
    """A row for each task and metric, a column for each model; the mean only where there are several tasks."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("items", justify="right")
    for model in results:
        table.add_column(model, justify="right", overflow="fold")
    first = next(iter(results.values()))
    for place, row in enumerate(first["tasks"]):
        arrow = "↑" if row["higher_is_better"] else "↓"
        cells = [_score(result["tasks"][place]) for result in results.values()]
        table.add_row(row["task"], f"{row['metric']} {arrow}", str(row["items"]), *cells)
    if len({row["task"] for row in first["tasks"]}) > 1:
        table.add_section()
        for place, row in enumerate(first["mean"]):
            cells = [_score(result["mean"][place]) for result in results.values()]
            table.add_row("mean of tasks", row["metric"], str(row["items"]), *cells)
    return table


def _score(row: Mapping[str, Any]) -> str:
    return f"{row['score']:.4f} ± {row['standard_error']:.4f}"
