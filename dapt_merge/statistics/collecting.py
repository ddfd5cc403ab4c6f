"""The pass over held-out text: a model in float32, one document or part of one at a time, numbers added in float32.

Fisher information is the empirical one: the labels are the text's own next tokens, not tokens drawn from the model. For
each sequence the gradient of its summed negative log-likelihood (the model's own loss, times its tokens) is squared and
added, and the sum is divided by all predicted tokens. It needs no seed, and text like the text that the merged model
will read. Gram matrices are added up from the inputs of every `nn.Linear` and divided by all tokens, so that texts of
different lengths weigh the same; layers that get the very same input (queries, keys and values; gate and up) share one.

Memory: the model and as much again for Fisher information; for Gram matrices the model and a matrix of
inputs × inputs for each input. A pass that is cut off goes on from the sums that it kept: they are added in the same
order, so the numbers are the same. What merges do with the numbers, this module does not know.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dapt_merge.checkpoints.naming import canonical_names
from dapt_merge.checkpoints.opening import open_checkpoint
from dapt_merge.corpus.config import CorpusSource
from dapt_merge.corpus.reading import bytes_of, content_fingerprint, read_source
from dapt_merge.corpus.tokens import encoded_documents
from dapt_merge.errors import DaptMergeError, InputError, nearest
from dapt_merge.statistics.files import KINDS, read_unfinished, write_unfinished
from dapt_merge.tensors.lazy_torch import torch

DEFAULT_SEQUENCE_LENGTH = 1024
_SECONDS_BETWEEN_KEEPING = 60.0


@dataclass(frozen=True)
class Collected:
    """The numbers of one pass, float32 under the names of the checkpoint's tensors, and the account of the pass.

    Tensors that share their numbers hold the same one.
    """

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
    keep: Path | None = None,
    on_size: Callable[[int, int], None] | None = None,
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
        keep: a file for the sums so far, written about once a minute; the same pass goes on from it. Whoever asks for
            it removes it in the end.
        on_size: called with (bytes of the numbers, bytes of memory that the pass takes) before the first text is read.
        on_progress: called with (tokens read, `tokens`) after each sequence.

    Raises:
        InputError: no such kind, model or corpus, or no text in it.
        DaptMergeError: the numbers overflowed.
    """
    from dapt_merge.evaluation.runner import load_causal_lm, load_tokenizer

    if kind not in KINDS:
        raise InputError(f"there is no kind '{kind}'.{nearest(kind, list(KINDS))}", remedy=f"Use {' or '.join(KINDS)}.")
    source = corpus if isinstance(corpus, CorpusSource) else CorpusSource.model_validate(corpus)
    bytes_of(source)  # a wrong path is told before the model is loaded
    stored = open_checkpoint(model)
    tokenizer, live = load_tokenizer(model), load_causal_lm(model, dtype="float32", device=device)
    names = {live_name: name for live_name, name in _names(live).items() if name in stored.tensors}
    counter = _FisherSum(live, names) if kind == "fisher" else _GramSum(live, names)
    if on_size:
        on_size(counter.nbytes, counter.nbytes + counter.model_copies * sum(p.nbytes for p in live.parameters()))
    about = {
        "kind": kind,
        "meaning": KINDS[kind],
        "model": stored.fingerprint(),
        "sequence_length": str(sequence_length),
        "corpus": content_fingerprint(source),
    }
    counts = _added_up(
        counter, read_sequences(source, tokenizer, tokens, sequence_length), about, keep, tokens, on_progress
    )
    if not counts.sequences:
        raise InputError(
            "the corpus holds no text of two tokens or more", where=source.path, remedy="Give one that does."
        )
    found = counter.finished(counts.predicted if kind == "fisher" else counts.read)
    _refuse_overflow(found, kind)
    return Collected(found, about | {"tokens": str(counts.read), "sequences": str(counts.sequences)})


@dataclass
class _Counts:
    """How far a pass has come: sequences, tokens read, tokens predicted."""

    sequences: int = 0
    read: int = 0
    predicted: int = 0


def _added_up(
    counter: _FisherSum | _GramSum,
    sequences: Iterator[list[int]],
    about: dict[str, str],
    keep: Path | None,
    tokens: int,
    on_progress: Callable[[int, int], None] | None,
) -> _Counts:
    """Add the sequences to the counter, from where an earlier pass of the same kind was cut off."""
    key = json.dumps(about | {"asked_for": tokens}, sort_keys=True)
    counts, done = _Counts(), 0
    found = None if keep is None else read_unfinished(keep, key)
    if found is not None:
        counts = _Counts(**found[1])
        for name, total in counter.sums.items():
            total.copy_(found[0][name])
        done = counts.sequences
    kept_at = time.monotonic()
    for number, sequence in enumerate(sequences):
        if number < done:
            continue
        counter.add(torch.tensor([sequence], device=counter.device))
        counts = _Counts(number + 1, counts.read + len(sequence), counts.predicted + len(sequence) - 1)
        if on_progress:
            on_progress(counts.read, tokens)
        if keep is not None and time.monotonic() - kept_at > _SECONDS_BETWEEN_KEEPING:
            write_unfinished(keep, key, counter.sums, vars(counts))
            kept_at = time.monotonic()
    return counts


def read_sequences(source: CorpusSource, tokenizer: Any, tokens: int, sequence_length: int) -> Iterator[list[int]]:
    """Yield the documents' token ids, an end-of-sequence token after each, in parts of at most `sequence_length`.

    At most `tokens` tokens come; parts of a single token, which predict nothing, are left out.
    """
    left = tokens
    for ids in encoded_documents((document.text for document in read_source(source)), tokenizer):
        for start in range(0, len(ids), sequence_length):
            part = ids[start : start + min(sequence_length, left)]
            if len(part) > 1:
                left -= len(part)
                yield part
            if left < 2:
                return


class _FisherSum:
    """Adds the squared gradients of each sequence's summed negative log-likelihood."""

    model_copies = 1

    def __init__(self, model: Any, names: dict[str, str]) -> None:
        self._model, self.device = model, model.device
        parameters = {names[name]: p for name, p in model.named_parameters() if name in names}
        self.sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        # A gradient is squared as soon as it is complete, and let go: they are never all in memory.
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._adder(self.sums[name]))
            for name, parameter in parameters.items()
        ]

    def _adder(self, total: Tensor) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            if parameter.grad is not None:
                total.addcmul_(parameter.grad, parameter.grad)
                parameter.grad = None

        return add

    @property
    def nbytes(self) -> int:
        return sum(total.nbytes for total in self.sums.values())

    def add(self, ids: Tensor) -> None:
        loss = self._model(input_ids=ids, labels=ids, use_cache=False).loss
        (loss * (ids.shape[1] - 1)).backward()

    def finished(self, tokens: int) -> dict[str, Tensor]:
        for hook in self._hooks:
            hook.remove()
        return {name: total.div_(tokens).cpu() for name, total in self.sums.items()}


class _GramSum:
    """Adds XᵀX of the inputs of every linear layer whose weight is a tensor of the checkpoint under its own name.

    `sums` has one matrix for each input; it goes by the first of the layers that get it.
    """

    model_copies = 1

    def __init__(self, model: Any, names: dict[str, str]) -> None:
        self._model, self.device = model, model.device
        owners = dict(model.named_parameters())  # a tied weight is listed once, under its first name
        layers = {
            names[f"{path}.weight"]: module
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and f"{path}.weight" in names and f"{path}.weight" in owners
        }
        self._first = self._same_inputs(layers)
        self.sums = {
            name: torch.zeros(layers[name].in_features, layers[name].in_features, device=self.device)
            for name in dict.fromkeys(self._first.values())
        }
        self._hooks = [layers[name].register_forward_pre_hook(self._adder(total)) for name, total in self.sums.items()]

    @property
    def nbytes(self) -> int:
        return sum(total.nbytes for total in self.sums.values())

    @torch.no_grad()
    def _same_inputs(self, layers: dict[str, nn.Linear]) -> dict[str, str]:
        """Return layer → the first layer that gets the very same tensor, seen by running two tokens through."""
        inputs: dict[str, Tensor] = {}  # held until the end, so that no memory is used for a second one

        def note(name: str) -> Callable[[nn.Module, Any], None]:
            def hook(_: nn.Module, given: Any) -> None:
                inputs.setdefault(name, given[0])

            return hook

        hooks = [module.register_forward_pre_hook(note(name)) for name, module in layers.items()]
        self._model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)
        for hook in hooks:
            hook.remove()
        first: dict[object, str] = {}
        same = {}
        for name in layers:
            given = inputs.get(name)
            place = name if given is None else (given.data_ptr(), tuple(given.shape), given.stride())
            same[name] = first.setdefault(place, name)
        return same

    def _adder(self, total: Tensor) -> Callable[[nn.Module, Any], None]:
        def add(_: nn.Module, inputs: Any) -> None:
            rows = inputs[0].detach().reshape(-1, total.shape[0]).float()
            total.addmm_(rows.t(), rows)

        return add

    @torch.no_grad()
    def add(self, ids: Tensor) -> None:
        self._model(input_ids=ids, use_cache=False)

    def finished(self, tokens: int) -> dict[str, Tensor]:
        for hook in self._hooks:
            hook.remove()
        matrices = {name: total.div_(tokens).cpu() for name, total in self.sums.items()}
        return {name: matrices[first] for name, first in self._first.items()}


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
