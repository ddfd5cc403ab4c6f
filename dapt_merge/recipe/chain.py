"""Several recipes in one file, each usable as a model of the others by its name.

    name: soup                        a merge that others build on; it is not kept
    merge_method: linear
    models: [{model: run-a}, {model: run-b}]
    parameters: {weight: 1}
    ---
    merge_method: ties                the one that is kept: without a name, or the one that no other uses
    base_model: base
    models: [{model: soup, parameters: {weight: 0.5}}]

The order in the file does not matter: what is used is merged first. A name goes before a folder of that name. What this
module does not know: how a merge is carried out (`merging.chain`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapt_merge.checkpoints.references import split_architecture
from dapt_merge.errors import InputError
from dapt_merge.recipe.reading import build_recipe, load_recipe, read_documents
from dapt_merge.recipe.schema import Recipe


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe of a file, and what the file's other recipes call its result (None: nothing)."""

    name: str | None
    recipe: Recipe


def load_recipes(source: str | Path, overrides: Sequence[str] = ()) -> list[NamedRecipe]:
    """Read all recipes of a YAML file, in an order in which they can be merged; the last one is the file's result.

    Args:
        source: the path; a file with a single recipe is read as `load_recipe` does.
        overrides: as in `load_recipe`, for the result's recipe; `NAME.key=value` for another one.

    Raises:
        InputError: as `load_recipe`; also names that are missing or given twice, recipes that use each other in a
            circle, or that nothing uses.
    """
    path = Path(source)
    documents = read_documents(path)
    if len(documents) == 1 and "name" not in documents[0]:
        return [NamedRecipe(None, load_recipe(path, overrides))]
    names = [_name(document, path, index) for index, document in enumerate(documents)]
    for index, name in enumerate(names):
        if name in names[:index]:
            what = "two recipes have no name" if name is None else f"two recipes are named '{name}'"
            raise InputError(what, where=path, remedy="Name all recipes but the result, each differently.")
    # Overrides can change which recipe uses which, so they are applied before the order is settled.
    final = _result(documents, names, path)
    recipes = {
        name: NamedRecipe(name, _build(document, _own(overrides, name, names, name == final), path, name, names))
        for name, document in zip(names, documents, strict=True)
    }
    return _in_order(recipes, final, path)


def _name(document: Mapping[str, Any], path: Path, index: int) -> str | None:
    name = document.get("name")
    if name is not None and (not isinstance(name, str) or not name or set(name) & set("+@=")):
        raise InputError(
            f"the name of recipe {index + 1} is {name!r}",
            where=f"{path}: name",
            remedy="Give a text without +, @ and =; quote a number.",
        )
    return name


def _build(
    document: Mapping[str, Any], overrides: Sequence[str], path: Path, name: str | None, names: Sequence[str | None]
) -> Recipe:
    content = {key: value for key, value in document.items() if key != "name"}
    origin = str(path) if name is None else f"{path} ({name})"
    return build_recipe(content, overrides, origin, path.parent, [known for known in names if known is not None])


def _own(overrides: Sequence[str], name: str | None, names: Sequence[str | None], is_result: bool) -> list[str]:
    """Return the overrides that are meant for one recipe, without its name in front (the longest that fits)."""
    known = sorted((known for known in names if known), key=len, reverse=True)
    addressed = {text: next((n for n in known if text.startswith(f"{n}.")), None) for text in overrides}
    mine = [text for text, whose in addressed.items() if (whose is None and is_result) or (whose == name and name)]
    return [text.removeprefix(f"{name}.") if addressed[text] else text for text in mine]


def _result(documents: Sequence[Mapping[str, Any]], names: Sequence[str | None], path: Path) -> str | None:
    """Return the name of the recipe whose output is kept: None, or that of the only one that no other mentions."""
    if None in names:
        return None
    mentioned = {text for document in documents for text in _texts({**document, "name": None})}
    mentioned |= {split_architecture(text)[0] for text in mentioned}
    mentioned |= {text.rpartition("+")[0] for text in mentioned}
    free = [name for name in names if name not in mentioned]
    if len(free) != 1:
        raise InputError(
            f"it is open which recipe's output to keep: {', '.join(map(str, free)) or 'each is used by another'}",
            where=path,
            remedy="Leave the name of that one out.",
        )
    return free[0]


def _texts(value: Any) -> set[str]:
    if isinstance(value, str):
        return {value}
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return {text for part in inner for text in _texts(part)}


def _in_order(recipes: Mapping[str | None, NamedRecipe], final: str | None, path: Path) -> list[NamedRecipe]:
    """Sort what the result needs so that every recipe comes after those that it uses."""
    order: list[NamedRecipe] = []

    def visit(name: str | None, users: tuple[str | None, ...]) -> None:
        if name in users:
            circle = " ▸ ".join(str(user) for user in (*users[users.index(name) :], name))
            raise InputError(
                f"recipes use each other in a circle: {circle}",
                where=path,
                remedy="Break it: one of them must go first.",
            )
        if recipes[name] in order:
            return
        for reference in _used(recipes[name].recipe):
            if reference in recipes:
                visit(reference, (*users, name))
        order.append(recipes[name])

    visit(final, ())
    unused = [str(name) for name, recipe in recipes.items() if recipe not in order]
    if unused:
        raise InputError(
            f"nothing uses the recipe '{unused[0]}'", where=path, remedy="Use its name as a model, or remove it."
        )
    return order


def _used(recipe: Recipe) -> set[str]:
    members = {member for e in recipe.entries() if e.average for member in e.average.checkpoints or ()}
    named = {*recipe.references(), *members, *(recipe.vocabulary.models() if recipe.vocabulary else ())}
    named |= {split_architecture(reference)[0] for reference in named}
    return named | {reference.rpartition("+")[0] for reference in named}  # the model under an adapter
