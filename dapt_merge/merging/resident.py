"""A merge into a live model: the inputs stay mapped, the model's parameters are rewritten in place.

This is what a search does hundreds of times, so nothing is opened, checked or allocated twice. The numbers are those of
the disk path, bit for bit, for the model's dtype. What the model is used for, this module does not know.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.checkpoints.keeping import keep_computed
from dapt_merge.checkpoints.live_names import copied_names, stored_state
from dapt_merge.checkpoints.naming import canonical_names
from dapt_merge.checkpoints.threads import default_threads, map_in_threads
from dapt_merge.checkpoints.tying import with_own_heads
from dapt_merge.errors import InputError, nearest
from dapt_merge.merging.agreement import agree, is_side_part
from dapt_merge.merging.plan import MergePlan, TensorJob, open_inputs, plan_from
from dapt_merge.merging.report import MergeReport, TensorOutcome, build_report
from dapt_merge.merging.tensor import merge_tensor
from dapt_merge.merging.trimming import settle_cutoffs
from dapt_merge.recipe import Recipe
from dapt_merge.tensors.dtypes import Dtype
from dapt_merge.tensors.lazy_torch import torch
from dapt_merge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class ResidentMerger:
    """Holds checkpoints, and turns a live model into any merge of them.

    Args:
        model: whose parameters are rewritten, each in its own dtype and on its own device; tied ones once.
        checkpoints: reference → checkpoint, all that recipes will name. They are checked against each other here.
        allow_config_mismatch: take checkpoints whose configurations differ, for recipes that allow it too.

    Raises:
        InputError: the checkpoints do not belong together, do not fit the model, or share its memory.

    Example:
        >>> import torch
        >>> from dapt_merge import make_recipe, open_checkpoint
        >>> ones, twos = {"weight": torch.ones(1, 2)}, {"weight": 2 * torch.ones(1, 2)}
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> merger = ResidentMerger(model, {"b": open_checkpoint(ones, "b"), "d": open_checkpoint(twos, "d")})
        >>> _ = merger.apply(make_recipe("b", ["d"], "linear", weight=0.5))
        >>> model.weight.tolist()
        [[1.5, 1.5]]
    """

    def __init__(
        self,
        model: PreTrainedModel | torch.nn.Module,
        checkpoints: Mapping[str, Checkpoint],
        *,
        allow_config_mismatch: bool = False,
    ) -> None:
        self.checkpoints = keep_computed(with_own_heads(checkpoints))
        self._agreement = agree(list(self.checkpoints.values()), allow_mismatch=allow_config_mismatch)
        self._mismatch_allowed = allow_config_mismatch
        self._live = _live_tensors(model, self._agreement.names)
        self._fingerprints: dict[str, str] = {}
        self._held = _Held()
        for checkpoint in self.checkpoints.values():
            _refuse_shared_memory(checkpoint, self._live)

    def apply(self, recipe: Recipe, *, threads: int | None = None, measure_rounding: bool = True) -> MergeReport:
        """Rewrite the model's parameters with the recipe's merge; its dtype is the model's, whatever the recipe says.

        If this raises, part of the model is already rewritten: apply a recipe again before using it.

        Raises:
            InputError: the recipe names a checkpoint that this merger does not hold, or an input holds NaN.
        """
        started = time.monotonic()
        plan = _for_live(self._plan(recipe), self._live)
        outcomes = _write(plan, self._live, self._held, threads, measure_rounding)
        inputs = {
            reference: self._fingerprint(reference, plan.checkpoints[reference]) for reference in plan.checkpoints
        }
        return build_report(plan, outcomes, output=None, inputs=inputs, seconds=time.monotonic() - started)

    def _plan(self, recipe: Recipe) -> MergePlan:
        held = {os.path.normpath(reference) for reference in self.checkpoints}
        for reference in recipe.references():
            if os.path.normpath(reference) not in held:
                raise InputError(
                    f"'{reference}' is not loaded.{nearest(reference, tuple(self.checkpoints))}",
                    where="the recipe",
                    remedy=f"Use one of: {', '.join(self.checkpoints)}.",
                )
        if recipe.vocabulary is not None:
            raise InputError(
                "a live model keeps its vocabulary, and the recipe settles another",
                where="tokenizer_source" if recipe.tokenizer is None else "tokenizer",
                remedy="Build the model anew with merge(recipe=…).to_model(), or merge to a folder.",
            )
        opened = open_inputs(recipe, self.checkpoints)
        if self._mismatch_allowed and not recipe.allow_config_mismatch:
            agree(list(opened.values()))
        return plan_from(recipe, opened, self._agreement)

    def _fingerprint(self, reference: str, checkpoint: Checkpoint) -> str:
        if reference not in self._fingerprints:
            self._fingerprints[reference] = checkpoint.fingerprint()
        return self._fingerprints[reference]


def fill_model(model: PreTrainedModel, plan: MergePlan) -> MergeReport:
    """Write a planned merge into a model that was built from the plan's configuration, in the model's dtype."""
    started = time.monotonic()
    live = _live_tensors(model, tuple(job.name for job in plan.jobs))
    plan = _for_live(plan, live)
    outcomes = _write(plan, live, _Held(), None, True)
    inputs = {reference: checkpoint.fingerprint() for reference, checkpoint in plan.checkpoints.items()}
    return build_report(plan, outcomes, output=None, inputs=inputs, seconds=time.monotonic() - started)


def _for_live(plan: MergePlan, live: Mapping[str, Tensor]) -> MergePlan:
    """Return the plan with the live model's dtypes, without the parts that the model's class does not use.

    Raises:
        InputError: the recipe's slices build other layers than the live model has.
    """
    used = [job for job in plan.jobs if job.name in live]
    if plan.recipe.stacks_layers:
        _refuse_other_stack(plan, live)
    warnings = plan.warnings
    if len(used) < len(plan.jobs):
        unused = ", ".join(job.name for job in plan.jobs if job.name not in live)
        warnings = (*warnings, f"{unused}: the live model's class does not use them, and they were not merged")
    dtypes = [Dtype.of(live[job.name].dtype) for job in used]
    jobs = tuple(
        job if job.out_dtype == dtype else replace(job, out_dtype=dtype)
        for job, dtype in zip(used, dtypes, strict=True)
    )
    return settle_cutoffs(replace(plan, jobs=jobs, warnings=warnings))


def _refuse_other_stack(plan: MergePlan, live: Mapping[str, Tensor]) -> None:
    made = {job.name: job.shape for job in plan.jobs}
    held = {name: tuple(tensor.shape) for name, tensor in live.items()}
    if made != held:
        name = min(name for name in {*made, *held} if made.get(name) != held.get(name))
        raise InputError(
            f"the recipe's slices make another model than the live one: they differ in '{name}'",
            where="slices",
            remedy="Build the model with merge(recipe=…).to_model(), or merge to a folder.",
        )


class _Held:
    """What outlasts a merge: inputs where they are computed on, and what was found out about them.

    Inputs that lie in files stay mapped, and on an accelerator they are copied to it once. Tensors in memory may change
    between merges: a change that torch knows of (its version counter) makes them new.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, str, torch.device], tuple[Hashable, StoredTensor]] = {}
        self._memories: dict[Hashable, tuple[Hashable, dict[Hashable, Any]]] = {}

    def read(self, plan: MergePlan, label: str, name: str, device: torch.device) -> StoredTensor:
        """Return an input on the device; it is held there as long as there is room and it does not change."""
        held = self._tensors.get((label, name, device))
        if held is not None and held[0] == _state(plan, label, name):
            return held[1]
        stored = plan.read(label, name)
        stays = stored.is_on_cpu if device.type == "cpu" else stored.device == device
        tensor = stored if stays else StoredTensor.of(stored.tensor.to(device))
        # What is computed when it is read is kept by its checkpoint, as far as there is room (`keeping`).
        if _has_room(device) and (tensor is not stored or not _is_computed(plan, label, name)):
            self._tensors[label, name, device] = _state(plan, label, name), tensor
        return tensor

    def memories(self, plan: MergePlan, job: TensorJob) -> tuple[dict[Hashable, Any], ...]:
        """Return the memories of a job: one for each model, shared by all merges of that model and base.

        There are none for a method that finds nothing out.
        """
        if job.base is None or job.parameters.method.measure is None:
            return ()
        base, *models = job.reads
        return tuple(self._memory(plan, base, model, job) for model in models)

    def _memory(
        self, plan: MergePlan, base: tuple[str, str], model: tuple[str, str], job: TensorJob
    ) -> dict[Hashable, Any]:
        states = _state(plan, *base), _state(plan, *model)
        key = base, model, job.in_dtype, job.arithmetic
        known = self._memories.get(key)
        if known is None or known[0] != states:
            known = self._memories[key] = states, {}
        return known[1]


def _state(plan: MergePlan, label: str, name: str) -> Hashable:
    """Return what changes when a tensor of a checkpoint changes: None for files, which do not."""
    checkpoint = plan.checkpoints.get(label)
    if checkpoint is None or _is_computed(plan, label, name):
        return None
    if checkpoint.tensors[checkpoint.aliases.get(name, name)].file is not None:
        return None
    tensor = checkpoint.read(name)
    try:
        return tensor.data_ptr(), tensor._version
    except RuntimeError:  # made in inference mode: not counted, so never the same twice
        return object()


def _is_computed(plan: MergePlan, label: str, name: str) -> bool:
    return label in plan.checkpoints and name in plan.checkpoints[label].computed


def _has_room(device: torch.device) -> bool:
    """Say whether a device can hold what was just put on it, and still has room to compute in."""
    if device.type != "cuda":
        return True
    free_bytes, all_bytes = torch.cuda.mem_get_info(device)
    return free_bytes > all_bytes // 8


def _write(
    plan: MergePlan, live: Mapping[str, Tensor], held: _Held, threads: int | None, measure_rounding: bool
) -> list[TensorOutcome]:
    def merge_in_place(job: TensorJob) -> TensorOutcome:
        target = live[job.name]
        merged = merge_tensor(
            job,
            lambda label, name: held.read(plan, label, name, target.device),
            plan.recipe.seed,
            measure_rounding=measure_rounding,
            out=target,
            memories=held.memories(plan, job),
        )
        return TensorOutcome.of(job, merged)

    if not all(job.parameters.method.elementwise for job in plan.jobs):
        return map_in_threads(merge_in_place, plan.jobs, size=lambda job: job.elements, threads=threads)
    return _in_lanes(merge_in_place, plan.jobs, threads or default_threads())


def _in_lanes(
    work: Callable[[TensorJob], TensorOutcome], jobs: Sequence[TensorJob], threads: int
) -> list[TensorOutcome]:
    """As `map_in_threads`, where nothing is allocated that would have to be bounded: each thread takes what is next."""
    largest_first = deque(sorted(range(len(jobs)), key=lambda index: -jobs[index].elements))
    outcomes: list[TensorOutcome | None] = [None] * len(jobs)

    def lane(_: int) -> None:
        try:
            while (index := _next(largest_first)) is not None:
                outcomes[index] = work(jobs[index])
        except BaseException:
            largest_first.clear()  # the other threads stop, too
            raise

    map_in_threads(lane, range(threads), size=lambda _: 1, threads=threads)
    return [outcome for outcome in outcomes if outcome is not None]


def _next(queue: deque[int]) -> int | None:
    try:
        return queue.popleft()
    except IndexError:
        return None


def _live_tensors(model: torch.nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return name → the model's own tensor; every tensor of the model is covered, a tied one under one name."""
    state = _named_state(model)
    if any(tensor.is_meta for tensor in state.values()):
        raise InputError(
            "the model has no memory for its weights (it is on the meta device)",
            where="the live model",
            remedy="Build it on the device that it will run on.",
        )
    missing = [name for name in names if name not in state and not is_side_part(name)]
    covered = {state[name].data_ptr() for name in names if name in state}
    extra = [name for name, tensor in state.items() if name not in names and tensor.data_ptr() not in covered]
    for problem, found in (("not in the model", missing), ("not in the checkpoints", extra)):
        if found:
            raise InputError(
                f"{len(found)} tensors are {problem}, the first is '{found[0]}'",
                where="the live model",
                remedy="Build the model from the configuration of the checkpoints.",
            )
    live = {name: state[name] for name in names if name in state}
    _refuse_one_memory_for_two(live)
    return live


def _named_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the model's state under the names that checkpoints have here."""
    state = stored_state(model, keep_vars=True)
    copied = copied_names(state, model)
    if copied:
        raise InputError(
            f"the model holds {len(copied)} tensors in another form than its files, the first is '{copied[0]}'",
            where="the live model",
            remedy="They cannot be rewritten in place: merge to a folder and load that.",
        )
    to_dict: Any = getattr(getattr(model, "config", None), "to_dict", dict)
    named = canonical_names(state, to_dict())
    return {named[name]: tensor for name, tensor in state.items()}


def _refuse_one_memory_for_two(live: Mapping[str, Tensor]) -> None:
    owners: dict[int, str] = {}
    for name, tensor in live.items():
        owner = owners.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if owner != name:
            raise InputError(
                f"the live model ties {name} to {owner}, and the checkpoints hold two tensors",
                where="the live model",
                remedy="Build the model with tie_word_embeddings false.",
            )


def _refuse_shared_memory(checkpoint: Checkpoint, live: Mapping[str, Tensor]) -> None:
    for name, tensor in live.items():
        info = checkpoint.tensors[checkpoint.aliases.get(name, name)]
        if info.shape != tuple(tensor.shape):
            raise InputError(
                f"'{name}' is {info.shape} in {checkpoint.label} and {tuple(tensor.shape)} in the live model",
                where="the live model",
                remedy="Build the model from the configuration of the checkpoints.",
            )
        if info.file is None and info.elements and checkpoint.read(name).data_ptr() == tensor.data_ptr():
            raise InputError(
                "the live model is itself an input: rewriting it would change what is merged",
                where=checkpoint.label,
                remedy="Give the checkpoint by its path, or a copy of the model.",
            )
