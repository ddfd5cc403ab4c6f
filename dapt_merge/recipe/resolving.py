"""From a recipe to the values for one tensor: which clause fits its name, and what its gradient is at its depth.

Precedence: a model's own setting, then the recipe's, then the method's default; within a list of filters the first that
fits the tensor's name, and when none fits the next in that order. What this module does not know: tensors' contents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dapt_merge.checkpoints.groups import tensor_group
from dapt_merge.errors import InputError
from dapt_merge.methods.contract import Method
from dapt_merge.recipe.parts import Part
from dapt_merge.recipe.schema import Recipe
from dapt_merge.recipe.settings import Clause, Scalar


@dataclass(frozen=True)
class ResolvedParameters:
    """A method and its parameter values for one tensor.

    `values` maps YAML parameter names to values; a per-model parameter is a tuple with one value for each of
    `Recipe.task_models()`, in that order.
    """

    method: Method
    values: dict[str, object]


def resolve(
    recipe: Recipe,
    name: str,
    layer: int | None,
    num_layers: int | None,
    *,
    part: Part | None = None,
    stored_names: Sequence[str] = (),
) -> ResolvedParameters:
    """Return the parameter values of `recipe` for the tensor `name`.

    Args:
        name: the tensor's name, for example `model.layers.3.mlp.up_proj.weight`.
        layer: its layer, counted from 0; None for embeddings, the final norm and the head.
        num_layers: how many layers the model has; needed only where a gradient meets a layer's tensor.
        part: which of `recipe.parts` the tensor belongs to (default: the first). With slices, `layer` and `num_layers`
            are counted within the slice.
        stored_names: what the tensor is called in each of the part's models, where that differs from `name`: filters
            of per-model parameters look at these.

    Raises:
        InputError: no clause of a required parameter fits the tensor, or the number of layers is needed and unknown.

    Example:
        >>> from dapt_merge.recipe import load_recipe
        >>> recipe = load_recipe(
        ...     {"merge_method": "slerp", "base_model": "b", "models": [{"model": "d"}], "parameters": {"t": [0, 1]}}
        ... )
        >>> resolve(recipe, "model.layers.1.mlp.up_proj.weight", 1, 3).values["t"]
        0.5
    """
    values: dict[str, object] = {}
    part = part or recipe.parts[0]
    for parameter in recipe.method.parameters:
        if part.constants is not None:
            picked = part.constants[parameter.name]
        else:
            chains = part.clauses[parameter.name]
            names = stored_names if parameter.per_model and stored_names else (name,) * len(chains)
            picked = tuple(
                _value(_first_fitting(chain, parameter.name, stored), recipe, name, layer, num_layers)
                for chain, stored in zip(chains, names, strict=True)
            )
        values[parameter.name] = picked if parameter.per_model else picked[0]
    return ResolvedParameters(recipe.method, values)


def _first_fitting(chain: Sequence[Clause], parameter_name: str, tensor_name: str) -> Clause:
    for clause in chain:
        if clause.fits(tensor_name):
            return clause
    raise InputError(
        f"no filter of '{parameter_name}' fits this tensor, and the parameter has no default",
        where=f"parameters.{parameter_name}, tensor {tensor_name}",
        remedy="End the list of filters with an entry that has a 'value' and no filter.",
    )


def _value(clause: Clause, recipe: Recipe, name: str, layer: int | None, num_layers: int | None) -> Scalar:
    if not clause.is_gradient:
        return clause.anchors[0]
    if layer is None:
        last = recipe.gradient_outer != "mergekit" and comes_after_the_layers(name)
        return clause.at(1.0 if last else 0.0)
    if num_layers is None:
        raise InputError(
            "the recipe has a gradient over the layers, and the number of layers of this model is unknown",
            where=f"tensor {name}",
            remedy="Use single values or filters for this model, or add num_hidden_layers to its config.json.",
        )
    # A model of one layer is its own last; heads for further tokens are numbered past the last layer.
    depth = 1.0 if num_layers <= 1 else min(1.0, layer / (num_layers - 1))
    return clause.at(depth)


def comes_after_the_layers(name: str) -> bool:
    """Say whether a tensor outside the layers sits behind them: the head and the final norm, not the embeddings."""
    kind = tensor_group(name).kind
    return kind == "head" or (kind == "norm" and "embed" not in name)
