"""What a merge would do, told before any weight is read: settings tensor by tensor, warnings, bytes.

The idea: tensors that are merged alike are one line, named by their groups and layers, so that a recipe for hundreds of
tensors reads in a few lines and whatever a filter singles out stands alone; lines that only follow a gradient from
layer to layer can be taken together. Which tokenizer and chat template go with them is told too. Of several recipes in
a file each is planned on the headers that the ones before it would write. What it costs, `cost` says; how it is shown,
this module does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dapt_merge.checkpoints.chat_template import stored_template
from dapt_merge.checkpoints.checkpoint import Checkpoint, TensorInfo
from dapt_merge.checkpoints.companions import updated_config
from dapt_merge.checkpoints.groups import GROUPS, tensor_group, with_layer
from dapt_merge.checkpoints.vocabulary import has_tokenizer
from dapt_merge.errors import DaptMergeError
from dapt_merge.merging.plan import MergePlan, TensorJob, plan_merge
from dapt_merge.methods.contract import Source, TensorContext, Values
from dapt_merge.recipe import NamedRecipe

# Fewer layers than this are read as easily one by one.
_SHORTEST_RUN = 3


@dataclass(frozen=True)
class ExplainedTensors:
    """Tensors that are merged alike.

    Attributes:
        names: of the tensors, in the order of the model.
        where: the same in words: groups and layers.
        method: the method's name.
        base: the checkpoint that is θ₀, or None.
        models: θ₁…θₙ.
        target: the checkpoint that the merged difference is added to, or None for the base itself.
        settings: every parameter's value where these tensors stand; a tuple has one for each of `models`.
        out_dtype: the dtype that they are written in.
        copied_from: the checkpoint that the result equals bit for bit, where the settings make it one; else None.
    """

    names: tuple[str, ...]
    where: str
    method: str
    base: str | None
    models: tuple[str, ...]
    target: str | None
    settings: Mapping[str, object]
    out_dtype: str
    copied_from: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the line as JSON-ready data."""
        return {
            "tensors": len(self.names),
            "where": self.where,
            "method": self.method,
            "base": self.base,
            "models": list(self.models),
            "target": self.target,
            "parameters": dict(self.settings),
            "out_dtype": self.out_dtype,
            "copied_from": self.copied_from,
            "names": list(self.names),
        }


def explain(plan: MergePlan) -> list[ExplainedTensors]:
    """Return the plan's tensors, those that are merged alike together, in the order in which they first occur.

    Example:
        >>> import torch
        >>> from dapt_merge import open_checkpoint, plan_merge, make_recipe
        >>> given = {name: open_checkpoint({"a": torch.ones(2), "b": torch.ones(2)}) for name in ("base", "dapt")}
        >>> plan = plan_merge(make_recipe("base", ["dapt"], "linear", weight=0.25), given)
        >>> [(line.where, line.settings["weight"]) for line in explain(plan)]
        [('all tensors', (0.25,))]
    """
    alike: dict[object, list[TensorJob]] = {}
    for job in plan.jobs:
        alike.setdefault(_kind_of_merge(job), []).append(job)
    everything = [job.name for job in plan.jobs]
    return [_explained(jobs, everything) for jobs in alike.values()]


@dataclass(frozen=True)
class ExplainedTokenizer:
    """The tokenizer and the chat template that the output carries.

    Attributes:
        taken_from: the checkpoint whose tokenizer files are copied; None: no input has any beside it.
        source: what the recipe says of the vocabulary ("base", "union", a model); None: nothing.
        tokens, rows, added: where it says something, how many tokens there are, for how many rows of the embedding,
            and how many of them the copied files lack and get.
        template: where the chat template comes from, in words; None: the output has none.
    """

    taken_from: str | None
    source: str | None
    tokens: int | None
    rows: int | None
    added: int
    template: str | None

    def sentences(self) -> list[str]:
        """Return a line on the tokenizer, and one on the chat template."""
        if self.taken_from is None:
            return ["tokenizer: none (there are no files of one)"]
        lines = [f"tokenizer: that of {self.taken_from}, as it is"]
        if self.source is not None:
            added = f" and {self.added} tokens more" if self.added else ""
            kind = {"base": "base's tokens", "union": "all inputs' tokens"}.get(self.source, f"tokens of {self.source}")
            lines = [
                f"tokenizer: that of {self.taken_from}{added} ({kind}): {self.tokens} tokens in {self.rows} rows; every"
                " input's rows are put in that order"
            ]
        return [*lines, f"chat template: {self.template or 'none'}"]


def explain_tokenizer(plan: MergePlan) -> ExplainedTokenizer:
    """Say which tokenizer and which chat template the output of a plan carries."""
    settled = plan.alignment
    folder = plan.config_from.folder if settled is None else settled.folder
    if folder is None or not has_tokenizer(folder):
        return ExplainedTokenizer(None, None if settled is None else settled.source, None, None, 0, None)
    named = [label for label, checkpoint in plan.checkpoints.items() if checkpoint.folder == folder]
    owner = plan.config_from.label if plan.config_from.label in named else next(iter(named), str(folder))
    return ExplainedTokenizer(
        taken_from=owner,
        source=None if settled is None else settled.source,
        tokens=None if settled is None else len(settled.tokens),
        rows=None if settled is None else settled.rows,
        added=0 if settled is None else len(settled.added),
        template=_template_in_words(plan, folder, owner),
    )


def _template_in_words(plan: MergePlan, folder: Path, owner: str) -> str | None:
    setting, chosen = plan.recipe.chat_template, plan.chat_template
    if chosen is None or setting is None:
        return f"that of {owner}" if stored_template(folder) else None
    if setting != "auto":
        return "the one that the recipe holds" if "{" in setting else f"{setting}, a built-in one"
    stored = {name: stored_template(model.folder) for name, model in plan.checkpoints.items() if model.folder}
    alike = [name for name, text in stored.items() if text and text.strip() == chosen]
    return f"the one that most inputs have: {', '.join(alike)}"


def plan_chain(chain: Sequence[NamedRecipe]) -> list[MergePlan]:
    """Plan the recipes of a file one after another, each on the headers that the ones before it would write.

    Raises:
        InputError: as `plan_merge`.
    """
    made: dict[str, Checkpoint] = {}
    plans = []
    for step in chain:
        plans.append(plan_merge(step.recipe, made))
        if step.name is not None:
            made[step.name] = _on_paper(plans[-1], step.name)
    return plans


def _on_paper(plan: MergePlan, name: str) -> Checkpoint:
    """Return what a merge would write, as far as headers go."""

    def read(tensor: str) -> NoReturn:
        raise DaptMergeError(f"'{tensor}' of {name} is planned and not merged yet")

    infos = [TensorInfo(job.name, job.out_dtype, job.shape, job.nbytes) for job in plan.jobs]
    giver = plan.config_from
    output = Checkpoint(
        name,
        read,
        infos,
        folder=giver.folder,
        config=updated_config(giver.config, plan.main_dtype),
        aliases={tied: owner for tied, owner in giver.aliases.items() if tied not in {info.name for info in infos}},
    )
    output.vocabulary_key = giver.vocabulary_key
    return output


def layer_runs(lines: Sequence[ExplainedTensors]) -> list[list[ExplainedTensors]]:
    """Return the lines with those together that are the same tensors of several layers and differ in numbers alone.

    A gradient gives every layer a line of its own; together they are one, that goes from its first value to its last.

    Example:
        >>> def line(layer, weight):
        ...     name = f"model.layers.{layer}.mlp.up_proj.weight"
        ...     return ExplainedTensors((name,), "", "linear", None, ("a",), None, {"weight": weight}, "float32", None)
        >>> [len(run) for run in layer_runs([line(0, 0.1), line(1, 0.2), line(2, 0.3)])]
        [3]
    """
    alike: dict[object, list[ExplainedTensors]] = {}
    for line in lines:
        alike.setdefault(_shape_of_line(line), []).append(line)
    runs: list[list[ExplainedTensors]] = []
    for several in alike.values():
        runs += [several] if len(several) >= _SHORTEST_RUN else [[line] for line in several]
    return runs


def layer_by_layer(run: Sequence[ExplainedTensors]) -> list[ExplainedTensors]:
    """Return for every layer of a run, in their order, the line that it is on; a run of one line as it is."""
    if len(run) == 1:
        return list(run)
    lines = {tensor_group(name).layer or 0: line for line in run for name in line.names}
    return [lines[layer] for layer in sorted(lines)]


def _shape_of_line(line: ExplainedTensors) -> object:
    """What lines of one run share: the same tensors in each of their layers, and all that is no number."""
    groups = [tensor_group(name) for name in line.names]
    stems: dict[int | None, set[str]] = {}
    for name, group in zip(line.names, groups, strict=True):
        stems.setdefault(group.layer, set()).add(with_layer(name, 0))
    every = {frozenset(of_layer) for of_layer in stems.values()}
    if None in stems or len(every) > 1 or len({group.stack for group in groups}) > 1:
        return line.names
    kinds = tuple((name, _without_numbers(value)) for name, value in line.settings.items())
    return every.pop(), line.method, line.base, line.models, line.target, line.out_dtype, line.copied_from, kinds


def _without_numbers(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(_without_numbers(single) for single in value)
    return float if isinstance(value, int | float) and not isinstance(value, bool) else value


def describe(names: Sequence[str], everything: Sequence[str]) -> str:
    """Say in words which of all tensors these are: by group and layers, and by name where a group is not complete.

    Example:
        >>> names = [f"model.layers.{n}.{end}.weight" for n in range(3) for end in ("mlp.up_proj", "self_attn.q_proj")]
        >>> describe([name for name in names if "mlp" in name], [*names, "lm_head.weight"])
        'mlp of layers 0–2'
    """
    if len(names) == len(everything):
        return "all tensors"
    complete = _layers_by_stem(everything)
    by_layers: dict[tuple[str | None, frozenset[int | None]], list[str]] = {}
    for (stack, stem), found_in in _layers_by_stem(names).items():
        by_layers.setdefault((stack, frozenset(found_in)), []).append(stem)
    parts = []
    for (stack, layers), stems in by_layers.items():
        inside = None not in layers
        rivals = {s for (other, s), found in complete.items() if other == stack and (None not in found) == inside}
        what = _named(stems, rivals)
        parts.append(f"{what} of {_layers(stack, layers)}" if inside else f"{what} outside the layers")
    return "; ".join(parts)


def _kind_of_merge(job: TensorJob) -> object:
    settings = tuple((name, value) for name, value in _settings(job).items())
    return settings, job.parameters.method.name, job.base, job.models, job.target, job.out_dtype


def _settings(job: TensorJob) -> Values:
    """The values that the method works with: filled in, and settled for the tensor's layer."""
    method = job.parameters.method
    values = method.complete(job.parameters.values, len(job.models), f"tensor {job.name}")
    if method.placed is None:
        return values
    return method.placed(values, TensorContext(job.name, layer=job.layer, num_layers=job.num_layers))


def _explained(jobs: Sequence[TensorJob], everything: Sequence[str]) -> ExplainedTensors:
    first = jobs[0]
    settings = _settings(first)
    names = tuple(job.name for job in jobs)
    return ExplainedTensors(
        names=names,
        where=describe(names, everything),
        method=first.parameters.method.name,
        base=first.base,
        models=first.models,
        target=first.target,
        settings=settings,
        out_dtype=first.out_dtype.value,
        copied_from=_copied_from(first, settings),
    )


def _copied_from(job: TensorJob, settings: Values) -> str | None:
    method = job.parameters.method
    if method.copy_of is None:
        return None
    source: Source | None = method.copy_of(settings, len(job.models), job.base is not None)
    if source is None:
        return None
    if job.target is not None:  # only a difference of nothing leaves it as it is
        return job.target if source == "base" else None
    return job.base if source == "base" else job.models[source]


def _layers_by_stem(names: Iterable[str]) -> dict[tuple[str | None, str], list[int | None]]:
    """Return (stack, name with its layer left open) → the layers that have it."""
    found: dict[tuple[str | None, str], list[int | None]] = {}
    for name in names:
        group = tensor_group(name)
        stem = name if group.layer is None else with_layer(name, 0)
        found.setdefault((group.stack, stem), []).append(group.layer)
    return found


def _named(stems: Sequence[str], rivals: Iterable[str]) -> str:
    """Name the groups that are here as a whole, then single tensors by the ends of their names."""
    kinds: dict[str, set[str]] = {}
    for stem in rivals:
        kinds.setdefault(tensor_group(stem).kind, set()).add(stem)
    whole = [kind for kind, members in kinds.items() if members <= set(stems)]
    single = [stem for stem in stems if tensor_group(stem).kind not in whole]
    return ", ".join([*(kind for kind in (*GROUPS, "other") if kind in whole), *(_short(stem) for stem in single)])


def _short(stem: str) -> str:
    end = stem.rpartition(".0.")[2] if tensor_group(stem).layer is not None else stem
    return end.removesuffix(".weight")


def _layers(stack: str | None, layers: frozenset[int | None]) -> str:
    """Write layer numbers as ranges."""
    numbers = sorted(layer for layer in layers if layer is not None)
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in ranges)
    return f"{stack + ' ' if stack else ''}layer{'s' if len(numbers) > 1 else ''} {text}"
