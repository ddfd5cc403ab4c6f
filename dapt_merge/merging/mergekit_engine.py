"""The same recipe carried out by mergekit instead: for comparison, and for whoever has to reproduce its numbers.

mergekit's arithmetic, its defaults and its reading of a recipe hold then; what it would pass over in silence is refused
(our own keys and parameters) or reported (those of its other methods). The output appears whole or not at all, with its
report and its card, as always; but what mergekit does not tell (fallbacks, what rounding loses, what each tensor got)
they cannot tell either. Nothing of mergekit is imported before a merge is asked for.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dapt_merge.atomic import atomic_folder, refuse_existing
from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.checkpoints.opening import open_checkpoint
from dapt_merge.checkpoints.references import split_architecture
from dapt_merge.errors import DaptMergeError, InputError, nearest
from dapt_merge.merging.card import CARD_FILE, model_card
from dapt_merge.merging.report import MergeReport, versions, way_to_inputs, write_report
from dapt_merge.merging.stream import RECIPE_FILE
from dapt_merge.recipe import Recipe, recipe_fingerprint
from dapt_merge.recipe.advice import inert_parameters
from dapt_merge.recipe.parts import is_inert
from dapt_merge.recipe.reading import relocated

# Keys of ours that change the result and that mergekit does not know.
_OURS = ("target", "freeze", "rounding", "allow_config_mismatch")


def merge_with_mergekit(
    recipe: Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    given: Mapping[str, Path] | None = None,
    recipe_text: str | None = None,
    steps: Sequence[dict[str, Any]] = (),
) -> MergeReport:
    """Let mergekit merge, and write its model, with recipe, report and card beside it, as `out`.

    Args:
        recipe: in mergekit's dialect alone; `seed` seeds its random methods.
        out: the folder to create.
        overwrite: replace an existing output, once the new one is complete.
        given: reference → folder, for inputs that the recipe calls otherwise: the outputs of other recipes.
        recipe_text, steps: see `merge_to_disk`.

    Raises:
        InputError: mergekit cannot express the recipe; an input is no full model in safetensors; `out` exists.
        DaptMergeError: mergekit is not installed, or fails.
    """
    refuse_existing(out, overwrite)
    started = time.monotonic()
    places = given or {}
    placed = relocated(recipe, lambda reference: str(places.get(reference, reference)))
    content = mergekit_content(placed)
    names = zip(recipe.references(), placed.references(), strict=True)
    opened = {name: open_checkpoint(place, name) for name, place in names}  # and no pickles
    for reference, checkpoint in opened.items():
        _refuse_input_as_output(checkpoint.folder, reference, Path(out))
    with atomic_folder(out, overwrite=overwrite) as folder:
        _run(content, folder, recipe.seed)
        report = _report(recipe, opened, open_checkpoint(folder), Path(out), started, steps)
        (folder / RECIPE_FILE).write_text(recipe_text or report.recipe, encoding="utf-8")
        write_report(report, folder)
        (folder / CARD_FILE).write_text(model_card(report, opened), encoding="utf-8")
    return report


def _report(
    recipe: Recipe,
    opened: Mapping[str, Checkpoint],
    result: Checkpoint,
    out: Path,
    started: float,
    steps: Sequence[dict[str, Any]],
) -> MergeReport:
    inputs = {reference: checkpoint.fingerprint() for reference, checkpoint in opened.items()}
    return MergeReport(
        recipe=recipe.to_yaml(),
        fingerprint=recipe_fingerprint(recipe, inputs),
        inputs=inputs,
        output=result.fingerprint(),
        tensors=len(result.tensors),
        fallbacks=None,
        notes={},
        updated_elements=None,
        lost_elements=None,
        lost_share=None,
        warnings=tuple(inert_parameters(recipe)),
        bytes_read=sum(checkpoint.nbytes for checkpoint in opened.values()),
        bytes_written=result.nbytes,
        seconds=time.monotonic() - started,
        versions=versions("mergekit"),
        engine="mergekit",
        working_folder=way_to_inputs(out),
        steps=tuple(steps),
    )


def mergekit_content(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as mergekit's configuration.

    Raises:
        InputError: the recipe has a key, a form or a parameter that mergekit would not know or would ignore.
    """
    content: dict[str, Any] = yaml.safe_load(recipe.to_yaml())
    ours = [key for key in _OURS if key in content]
    if any(entry.average for entry in recipe.entries()):
        ours.append("average")
    if any(c.group for part in recipe.parts for chains in part.clauses.values() for chain in chains for c in chain):
        ours.append("a setting by group")
    if content.pop("gradient_outer", None) == "last":
        ours.append("gradient_outer: last")
    if ours:
        raise InputError(
            f"mergekit knows no {', no '.join(ours)}",
            where="--engine mergekit",
            remedy="Remove it from the recipe, or use --engine native.",
        )
    if recipe.merge_method == "linear" and any(part.base is not None for part in recipe.parts):
        raise InputError(
            "linear with a base_model outside the models is WiSE-FT here, and something else in mergekit",
            where="--engine mergekit",
            remedy="List the base among the models with its own weight, or use --engine native.",
        )
    _refuse_unknown_parameters(recipe)
    content.pop("seed", None)
    in_long_form: dict[str, Any] = _in_long_form(content)
    return in_long_form


def _in_long_form(value: Any) -> Any:
    """Write references that state an architecture as mergekit does; it has no short form for them."""
    if isinstance(value, dict):
        return {key: _in_long_form(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_in_long_form(inner) for inner in value]
    plain, architecture = split_architecture(value) if isinstance(value, str) else (value, None)
    if architecture is None:
        return value
    model, _, adapter = plain.rpartition("+") if "+" in plain else (plain, "", None)
    return {"model": model, "lora": adapter, "override_architecture": architecture}


def _refuse_unknown_parameters(recipe: Recipe) -> None:
    """mergekit passes over parameters that it does not know; here that is an error."""
    try:
        from mergekit import merge_methods
    except ImportError as error:
        raise _not_installed() from error
    try:
        spec = merge_methods.get(recipe.merge_method).spec
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            f"mergekit has no merge method '{recipe.merge_method}'",
            where="merge_method",
            remedy="Choose one that it has, or use --engine native.",
        ) from error
    known = [parameter.name for parameter in spec.parameters]
    blocks = [recipe.parameters, *(entry.parameters for entry in recipe.entries())]
    blocks += [dict(block) for part in recipe.parts for block in part.between]
    for name in (name for block in blocks for name in block):
        if name not in known and not is_inert(name, recipe.method):
            raise InputError(
                f"mergekit's {recipe.merge_method} has no parameter '{name}' and would ignore it."
                f"{nearest(name, known)}",
                where=f"parameters.{name}",
                remedy="Remove it, or use --engine native.",
            )


def _run(content: dict[str, Any], folder: Path, seed: int) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    # mergekit writes every model with an adapter out as a whole one before it merges.
    _forget_models()  # whoever else in this process used mergekit may have left some
    with _quiet_logging(), tempfile.TemporaryDirectory(prefix=".adapters-", dir=folder.parent) as adapters:
        options = MergeOptions(
            quiet=True, write_model_card=False, random_seed=seed, trust_remote_code=False, lora_merge_cache=adapters
        )
        try:
            run_merge(MergeConfiguration.model_validate(content), str(folder), options)
        except Exception as error:  # mergekit raises many kinds, for its users' faults and for its own
            raise DaptMergeError(
                f"mergekit failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'}",
                where="--engine mergekit",
                remedy="Try --engine native, which says what is wrong with an input.",
            ) from error
        finally:
            _forget_models()


def _forget_models() -> None:
    """mergekit keeps opened models by name: another folder of that name would be served from before."""
    from mergekit.architecture.auto import infer_architecture_info
    from mergekit.io.tasks import LoaderCache

    LoaderCache().loaders.clear()
    infer_architecture_info.cache_clear()


@contextmanager
def _quiet_logging() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _refuse_input_as_output(folder: Path | None, reference: str, out: Path) -> None:
    if folder is not None and folder.resolve().is_relative_to(out.resolve()):
        raise InputError(
            f"the output would replace its own input '{reference}'", where=out, remedy="Choose another output folder."
        )


def _not_installed() -> DaptMergeError:
    return DaptMergeError(
        "mergekit is not installed",
        where="--engine mergekit",
        remedy="pip install mergekit, or use --engine native.",
    )
