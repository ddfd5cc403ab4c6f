"""How one text names a checkpoint, and the architecture that a recipe says it has.

    PATH                                         a folder, a file, a hub id
    ORGANISATION/NAME@REVISION                   a hub id in a state of its own
    MODEL+ADAPTER                                a LoRA adapter on a model
    MODEL?override_architecture=CLASS            the model, with CLASS as the `architectures` of its config.json

The last one stands for mergekit's long form `{model: MODEL, override_architecture: CLASS}`, so that a reference is a
text everywhere, in reports and fingerprints too. What the texts lead to, `opening` knows.
"""

from __future__ import annotations

_MARK = "?override_architecture="


def with_architecture(model: str, architecture: str | None) -> str:
    """Return the text for a model whose architecture is stated; None states none.

    Example:
        >>> with_architecture("old/a+b", "LlamaForCausalLM")
        'old/a+b?override_architecture=LlamaForCausalLM'
    """
    return model if architecture is None else f"{model}{_MARK}{architecture}"


def split_architecture(reference: str) -> tuple[str, str | None]:
    """Return the model that a reference names, and the architecture that it states for it or None.

    Example:
        >>> split_architecture("old/a?override_architecture=LlamaForCausalLM"), split_architecture("old/a")
        (('old/a', 'LlamaForCausalLM'), ('old/a', None))
    """
    model, mark, architecture = reference.partition(_MARK)
    return (model, architecture) if mark else (reference, None)
