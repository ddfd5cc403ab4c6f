"""LiNeS: the merged task vector scaled by depth, so that shallow layers, where general ability sits, move least.

The idea: λ(l) = alpha + beta·(l − 1)/(L − 1) for layer l of L, on top of whatever made the task vector. So this is not
a method beside the others but a factor on their `lambda`: every method that declares a `lambda` exists a second time,
as `lines_<method>`, with the two parameters more; `lines` alone is the one on task arithmetic. A gradient on `lambda`
in a recipe does the same, with any number of anchors; this one has the paper's parameters, and a search can draw them.

Which layer a tensor belongs to, the caller says (`TensorContext.layer`): embeddings count as the first layer, the final
norm and the head as the last. A model of one layer is its own last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from dapt_merge.errors import InputError
from dapt_merge.methods.contract import Method, Parameter, TensorContext, Values

ALPHA = Parameter("alpha", None, "scale of the merged task vector in the first layer")
BETA = Parameter("beta", None, "what the scale of the last layer has more than that of the first")
_OWN = (ALPHA.name, BETA.name)


def layer_scale(alpha: float, beta: float, context: TensorContext) -> float:
    """Return λ(l) for the tensor's layer.

    Raises:
        InputError: it is not known which layer of how many the tensor belongs to.

    Example:
        >>> layer_scale(0.2, 0.8, TensorContext("w", layer=1, num_layers=5))
        0.4
    """
    if context.layer is None or context.num_layers is None:
        raise InputError(
            "the scale depends on the layer, and the number of layers of this model is unknown",
            where=f"tensor {context.name}",
            remedy="Add num_hidden_layers to the model's config.json, or use the method without 'lines'.",
        )
    if context.num_layers == 1:
        return alpha + beta
    return alpha + beta * context.layer / (context.num_layers - 1)


def with_layer_scale(inner: Method) -> Method:
    """Return the method whose `lambda` is multiplied with λ(l); everything else is the inner one's."""

    def dead_knobs(values: dict[str, object], count: int) -> list[str]:
        if values.get("alpha") == values.get("beta") == 0:
            return ["alpha: with alpha and beta 0 every layer is the base's, whatever the other parameters are"]
        explain = inner.dead_knobs
        return [] if explain is None else explain({k: v for k, v in values.items() if k not in _OWN}, count)

    return replace(
        inner,
        name="lines" if inner.name == "task_arithmetic" else f"lines_{inner.name}",
        parameters=(*inner.parameters, ALPHA, BETA),
        reference=f"LiNeS, arXiv:2410.17146, on {inner.name} ({inner.reference})",
        placed=_placed,
        dead_knobs=dead_knobs,
    )


def combinations(methods: Iterable[Method]) -> list[Method]:
    """Return the layer-scaled form of every method that has one: those with a `lambda`, but no alpha or beta."""
    names = [(method, {parameter.name for parameter in method.parameters}) for method in methods]
    return [with_layer_scale(method) for method, own in names if "lambda" in own and not own.intersection(_OWN)]


def _placed(values: Values, context: TensorContext) -> Values:
    scale = layer_scale(values["alpha"], values["beta"], context)
    settled = {name: value for name, value in values.items() if name not in _OWN}
    settled["lambda"] *= scale
    return settled
