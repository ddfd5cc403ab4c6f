"""Passthrough: a tensor copied, or scaled. What layer stacks are made of when a slice has one source.

Nothing is merged, so the copy is the input bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dapt_merge.methods.contract import Parameter, Source, TensorContext, Values
from dapt_merge.methods.registry import method

if TYPE_CHECKING:
    from torch import Tensor


def _copy_of(values: Values, count: int, base_given: bool) -> Source | None:
    return 0 if values["scale"][0] == 1 else None


@method(
    "passthrough",
    parameters=(Parameter("scale", 1.0, "factor of the copied tensor", per_model=True),),
    base="unused",
    min_models=1,
    max_models=1,
    reference="layer stacking as in SOLAR's depth up-scaling, arXiv:2312.15166",
    elementwise=True,
    copy_of=_copy_of,
)
def passthrough(
    base: Tensor | None, models: Sequence[Tensor], *, scale: tuple[float, ...], context: TensorContext
) -> Tensor:
    """Return scale·θ₁ of the one model; scale 1 is θ₁ itself.

    A scale of 0 on `o_proj` and `down_proj` makes a copied layer the identity: a deeper model that computes what the
    shallower one does, ready to be trained further.
    """
    return models[0] * scale[0]
