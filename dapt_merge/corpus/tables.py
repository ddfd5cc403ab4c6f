"""Documents out of tables: Parquet files, folders that `datasets` wrote, data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dapt_merge.corpus.config import CorpusSource
from dapt_merge.corpus.records import Document, checked_text, file_label, no_field
from dapt_merge.errors import InputError, nearest

_ROWS_AT_ONCE = 1000


def parquet_rows(file: Path, field: str) -> Iterator[Document]:
    """Yield the documents of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file, memory_map=True) as table:
            if field not in table.schema_arrow.names:
                raise no_field(field, list(table.schema_arrow.names), str(file))
            number = 0
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield Document(checked_text(value, field, f"{file}, row {number}"), file_label(file), number)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"the Parquet file cannot be read ({_first_line(error)})", where=file, remedy="Fetch or make it again."
        ) from None


def is_dataset_folder(path: Path) -> bool:
    """Say whether `datasets` wrote this folder with `save_to_disk`."""
    return path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def dataset_rows(source: CorpusSource, path: Path) -> Iterator[Document]:
    """Yield the documents of a folder that `datasets` wrote."""
    import datasets

    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a broken folder makes of pyarrow, json or datasets
        raise InputError(
            f"the data set folder cannot be opened ({_first_line(error)})", where=path, remedy="Save it again."
        ) from None
    if isinstance(rows, datasets.DatasetDict):
        if source.split not in rows:
            raise InputError(
                f"the data set has no split '{source.split}'.{nearest(source.split, list(rows))}",
                where=path,
                remedy=f"Set 'split' to one of: {', '.join(rows)}.",
            )
        rows = rows[source.split]
    if source.text_field not in rows.column_names:
        raise no_field(source.text_field, rows.column_names, str(path))
    yield from _rows(rows.select_columns([source.text_field]), source.text_field, str(path))


def hub_rows(source: CorpusSource) -> Iterator[Document]:
    """Yield the documents of a data set of the hub."""
    label = f"{source.hub} ({source.split})"
    rows = _hub_dataset(source)
    if rows.column_names is not None and source.text_field not in rows.column_names:
        raise no_field(source.text_field, rows.column_names, label)
    yield from _rows(rows, source.text_field, label)


def _hub_dataset(source: CorpusSource) -> Any:
    """Open a hub data set as a stream; offline, from the cache of `datasets`, memory-mapped."""
    import datasets

    try:
        return datasets.load_dataset(source.hub, source.subset, split=source.split, streaming=not _is_offline())
    except Exception as error:  # the network, the hub, a loading script, a missing split: the user can mend each
        offline = " (offline: HF_HUB_OFFLINE is set)" if _is_offline() else ""
        raise InputError(
            f"the hub data set cannot be opened{offline}: {type(error).__name__}: {_first_line(error)}",
            where=source.place,
            remedy="Check its name, subset and split; offline, load it once with the network on.",
        ) from None


def _is_offline() -> bool:
    """Say whether the hub may not be asked."""
    import datasets

    return bool(datasets.config.HF_HUB_OFFLINE)


def _rows(rows: Any, field: str, label: str) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        if field not in row:
            raise no_field(field, list(row), f"{label}, row {number}")
        yield Document(checked_text(row[field], field, f"{label}, row {number}"), label, number)


def hub_version(source: CorpusSource) -> str:
    """Return what the hub names the content of a data set by."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(source.hub, source.subset)
    except Exception as error:  # see _hub_dataset
        raise InputError(
            f"the hub data set cannot be opened: {type(error).__name__}: {_first_line(error)}",
            where=source.place,
            remedy="Check its name and subset; offline, load it once with the network on.",
        ) from None
    return f"{builder.config_id}\0{builder.hash}\0{builder.config.version}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
