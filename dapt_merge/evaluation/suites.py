"""A suite: a named list of lm-eval tasks on one axis, read from YAML.

The idea: what is measured is data. A suite says which tasks make up the domain score or the general score and where
their lm-eval YAML files lie; prompts, metrics and few-shot counts stay in those files. This module does not load tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from dapt_merge.errors import InputError
from dapt_merge.yaml_files import explained, read_mapping


class Suite(BaseModel):
    """A named list of lm-eval tasks on one axis.

    Args:
        name: how tables and reports call it.
        axis: "domain" (what DAPT is for) or "general" (what it may cost).
        tasks: names of lm-eval tasks, groups or tags; their scores are averaged task by task.
        language: language of the tasks, such as "fr", for reports by language.
        include_path: folders of lm-eval task YAML files, relative to the suite file. Tasks that are in none of them
            are looked up among those that lm-eval ships.
        description: one sentence for the reader.

    Example:
        >>> Suite(name="icd", axis="domain", tasks=["icd11_fr"]).language is None
        True
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    axis: Literal["domain", "general"]
    tasks: list[str]
    language: str | None = None
    include_path: list[Path] = []
    description: str = ""

    @field_validator("include_path", mode="before")
    @classmethod
    def _one_folder_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value

    @field_validator("tasks")
    @classmethod
    def _distinct_tasks(cls, tasks: list[str]) -> list[str]:
        if not tasks:
            raise ValueError("a suite needs at least one task")
        repeated = sorted({task for task in tasks if tasks.count(task) > 1})
        if repeated:
            raise ValueError(f"listed twice: {', '.join(repeated)}")
        return tasks


def load_suite(path: str | Path) -> Suite:
    """Read a suite file; its include paths come back absolute.

    Raises:
        InputError: the file is missing or no YAML mapping, a key is unknown (the nearest known one is named) or has a
            wrong value, or an include path is no folder.
    """
    path = Path(path)
    content = read_mapping(path, noun="suite", remedy="Write the keys name, axis, tasks and include_path.")
    try:
        suite = Suite.model_validate(content)
    except ValidationError as error:
        raise explained(error, path, lambda location: list(Suite.model_fields)) from None
    folders = [(path.parent / folder.expanduser()).resolve() for folder in suite.include_path]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(
                f"the task folder does not exist: {folder}",
                where=f"{path}, key include_path",
                remedy="Correct include_path; it is relative to the suite file.",
            )
    return suite.model_copy(update={"include_path": folders})
