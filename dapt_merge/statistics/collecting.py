"""The pass over held-out text: a model in float32, one document or part of one at a time, numbers added in float32.

Fisher information is the empirical one: the labels are the text's own next tokens, not tokens drawn from the model. For
each sequence the gradient of its summed negative log-likelihood (the model's own loss, times its tokens) is squared and
added, and the sum is divided by all predicted tokens. It needs no seed, and text like the text that the merged model
will read. Gram matrices are added up from the inputs of every `nn.Linear` and divided by all tokens, so that texts of
different lengths weigh the same.

Memory: the model, its gradients and as much again for Fisher information; for Gram matrices the model and a matrix of
inputs × inputs for each linear layer. What merges do with the numbers, this module does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dapt_merge.checkpoints.naming import canonical_names
from dapt_merge.checkpoints.opening import open_checkpoint
from dapt_merge.errors import DaptMergeError, InputError, nearest
from dapt_merge.pretraining.config import CorpusSource
from dapt_merge.pretraining.corpus import content_fingerprint, corpus_files, read_documents
from dapt_merge.statistics.files import KINDS

DEFAULT_SEQUENCE_LENGTH = 1024


@dataclass(frozen=True)
class Collected:
    """The numbers of one pass, float32 under the names of the checkpoint's tensors, and the account of the pass."""

    tensors: dict[str, Tensor]
    about: dict[str, str]

    @property
    def tokens(self) -> int:
        """How many tokens the model read."""
        return int(self.about["tokens"])


def collect_statistics(
    model: str | Path,
    corpus: str | Path | CorpusSource,
    kind: str,
    tokens: int,
    *,
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH,
    device: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Collected:
    """Run a model over the first `tokens` tokens of a corpus.

    Args:
        model: a model folder or hub id, with its tokenizer.
        corpus: a `.jsonl` or `.txt` file, a folder of such files, or a corpus source as in a pre-training file.
        kind: "fisher" or "gram".
        tokens: how many tokens to read; fewer are read when the corpus is shorter.
        sequence_length: documents longer than this are read in parts.
        device: where to run it (default: an accelerator if there is one).
        on_progress: called with (tokens read, `tokens`) after each sequence.

    Raises:
        InputError: no such kind, model or corpus, or no text in it.
        DaptMergeError: the numbers overflowed.
    """
    from dapt_merge.evaluation.runner import load_causal_lm, load_tokenizer

    if kind not in KINDS:
        raise InputError(f"there is no kind '{kind}'.{nearest(kind, list(KINDS))}", remedy=f"Use {' or '.join(KINDS)}.")
    source = corpus if isinstance(corpus, CorpusSource) else CorpusSource.model_validate(corpus)
    corpus_files(source)  # a wrong path is told before the model is loaded
    stored = open_checkpoint(model)
    tokenizer, live = load_tokenizer(model), load_causal_lm(model, dtype="float32", device=device)
    names = {live_name: name for live_name, name in _names(live).items() if name in stored.tensors}
    counter = _FisherSum(live, names) if kind == "fisher" else _GramSum(live, names)
    sequences = read = predicted = 0
    for sequence in read_sequences(source, tokenizer, tokens, sequence_length):
        counter.add(torch.tensor([sequence], device=live.device))
        sequences, read, predicted = sequences + 1, read + len(sequence), predicted + len(sequence) - 1
        if on_progress:
            on_progress(read, tokens)
    if not sequences:
        raise InputError(
            "the corpus holds no text of two tokens or more", where=source.path, remedy="Give one that does."
        )
    found = counter.finished(predicted if kind == "fisher" else read)
    _refuse_overflow(found, kind)
    about = {
        "kind": kind,
        "meaning": KINDS[kind],
        "model": stored.fingerprint(),
        "tokens": str(read),
        "sequences": str(sequences),
        "sequence_length": str(sequence_length),
        "corpus": content_fingerprint(source),
    }
    return Collected(found, about)


def read_sequences(source: CorpusSource, tokenizer: Any, tokens: int, sequence_length: int) -> Iterator[list[int]]:
    """Yield the documents' token ids, an end-of-sequence token after each, in parts of at most `sequence_length`.

    At most `tokens` tokens come; parts of a single token, which predict nothing, are left out.
    """
    left = tokens
    for file in corpus_files(source):
        for text in read_documents(file, source.text_field, source.document):
            if not text.strip():
                continue
            # Split special tokens: what is spelled like one in a text is text.
            ids = list(tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"])
            if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
                ids.append(tokenizer.eos_token_id)
            for start in range(0, len(ids), sequence_length):
                part = ids[start : start + min(sequence_length, left)]
                if len(part) > 1:
                    left -= len(part)
                    yield part
                if left < 2:
                    return


class _FisherSum:
    """Adds the squared gradients of each sequence's summed negative log-likelihood."""

    def __init__(self, model: Any, names: dict[str, str]) -> None:
        self._model = model
        self._parameters = {names[name]: p for name, p in model.named_parameters() if name in names}
        self._sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self._parameters.items()}

    def add(self, ids: Tensor) -> None:
        self._model.zero_grad(set_to_none=True)
        loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss
        (loss * (ids.shape[1] - 1)).backward()
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._sums[name].addcmul_(parameter.grad, parameter.grad)

    def finished(self, tokens: int) -> dict[str, Tensor]:
        self._model.zero_grad(set_to_none=True)
        return {name: (total / tokens).cpu() for name, total in self._sums.items()}


class _GramSum:
    """Adds XᵀX of the inputs of every linear layer whose weight is a tensor of the checkpoint under its own name."""

    def __init__(self, model: Any, names: dict[str, str]) -> None:
        self._model = model
        self._sums: dict[str, Tensor] = {}
        owners = dict(model.named_parameters())  # a tied weight is listed once, under its first name
        self._hooks = [
            module.register_forward_pre_hook(self._adder(names[f"{path}.weight"], module))
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and f"{path}.weight" in names and f"{path}.weight" in owners
        ]

    def _adder(self, name: str, module: nn.Linear) -> Callable[[nn.Module, Any], None]:
        total = torch.zeros(module.in_features, module.in_features, device=module.weight.device)
        self._sums[name] = total

        def add(_: nn.Module, inputs: Any) -> None:
            rows = inputs[0].detach().reshape(-1, module.in_features).float()
            total.addmm_(rows.t(), rows)

        return add

    @torch.no_grad()
    def add(self, ids: Tensor) -> None:
        self._model(input_ids=ids, use_cache=False)

    def finished(self, tokens: int) -> dict[str, Tensor]:
        for hook in self._hooks:
            hook.remove()
        return {name: (total / tokens).cpu() for name, total in self._sums.items()}


def _names(model: Any) -> dict[str, str]:
    """Return the live model's parameter name → the name that a checkpoint calls the tensor."""
    return canonical_names([name for name, _ in model.named_parameters()], model.config.to_dict())


def _refuse_overflow(found: dict[str, Tensor], kind: str) -> None:
    for name, tensor in found.items():
        if tensor.numel() and not bool(torch.isfinite(tensor).all()):
            raise DaptMergeError(
                f"the {kind} statistics hold NaN or infinite values",
                where=f"tensor {name}",
                remedy="Check the model on this text: dapt-merge eval; a diverged model cannot be weighed.",
            )
