"""What a live model keeps between merges never shows in its numbers."""

import pytest
import torch
from torch import Tensor

from dapt_merge import make_recipe, open_checkpoint
from dapt_merge.checkpoints.checkpoint import Checkpoint
from dapt_merge.errors import InputError
from dapt_merge.merging import resident
from dapt_merge.merging.resident import ResidentMerger

METHODS = {
    "linear": {},
    "slerp": {},
    "task_arithmetic": {},
    "ties": {"density": 0.4},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "della": {"density": 0.5},
    "nearswap": {},
}


class Two(torch.nn.Module):
    """A model of two tensors."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.zeros(30, 70, dtype=dtype))
        self.second = torch.nn.Parameter(torch.zeros(90, dtype=dtype))

    def values(self) -> list[Tensor]:
        return [self.first.detach().clone(), self.second.detach().clone()]


def state(seed: int, near: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"first": (30, 70), "second": (90,)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if near is not None:
        drawn = {name: near[name].float() + 0.1 * value for name, value in drawn.items()}
    return {name: value.bfloat16() for name, value in drawn.items()}


@pytest.fixture
def states() -> dict[str, dict[str, Tensor]]:
    base = state(0)
    return {"base": base, "one": state(1, base), "two": state(2, base)}


def opened(states: dict[str, dict[str, Tensor]]) -> dict[str, Checkpoint]:
    return {label: open_checkpoint(values, label) for label, values in states.items()}


def merged(merger: ResidentMerger, model: Two, method: str, dapt: list[str], **settings: float) -> list[Tensor]:
    share = {"t": settings.pop("weight")} if method == "nearswap" else {}
    merger.apply(make_recipe("base", dapt, method, **share, **settings))
    return model.values()


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_merger_that_has_merged_before_gives_what_a_new_one_gives(states, method, dtype):
    model = Two(dtype)
    used = ResidentMerger(model, opened(states))
    dapt = [["one"], ["two"]] if method in ("slerp", "nearswap") else [["one"], ["two"], ["one", "two"], ["two", "one"]]
    for weight in (0.3, 0.8):
        for names in dapt:
            again = merged(used, model, method, names, weight=weight, **METHODS[method])
            fresh = merged(
                ResidentMerger(model, opened(states)), model, method, names, weight=weight, **METHODS[method]
            )
            assert same(again, fresh)


@pytest.mark.parametrize("method", ["ties", "slerp", "breadcrumbs"])
@pytest.mark.parametrize("whose", ["base", "one"])
def test_a_tensor_in_memory_that_changes_between_merges_is_seen(states, method, whose):
    model = Two(torch.bfloat16)
    merger = ResidentMerger(model, opened(states))
    before = merged(merger, model, method, ["one"], weight=0.5, **METHODS[method])
    states[whose]["first"].mul_(-3)
    states[whose]["second"] = states[whose]["second"] + 1  # another tensor under the name
    after = merged(merger, model, method, ["one"], weight=0.5, **METHODS[method])
    fresh = merged(ResidentMerger(model, opened(states)), model, method, ["one"], weight=0.5, **METHODS[method])
    assert same(after, fresh)
    assert not same(before, after)


def test_thresholds_and_angles_are_found_once(states, monkeypatch):
    from dapt_merge.methods import spherical, ties

    found: list[str] = []
    select, angle = ties.find_cutoffs, spherical._cosine
    monkeypatch.setattr(ties, "find_cutoffs", lambda *given: found.append("cutoffs") or select(*given))
    monkeypatch.setattr(spherical, "_cosine", lambda *given: found.append("angle") or angle(*given))
    model = Two(torch.bfloat16)
    merger = ResidentMerger(model, opened(states))
    for weight in (0.2, 0.4, 0.6):
        merged(merger, model, "ties", ["one", "two"], weight=weight, density=0.4)
        merged(merger, model, "slerp", ["one"], weight=weight)
    assert found.count("cutoffs") == 4  # two tensors of two models
    assert found.count("angle") == 2
    merged(merger, model, "ties", ["two"], weight=0.2, density=0.4)
    assert found.count("cutoffs") == 4
    merged(merger, model, "ties", ["two"], weight=0.2, density=0.5)
    assert found.count("cutoffs") == 6


def test_what_is_kept_of_a_tensor_is_bounded(states):
    model = Two(torch.bfloat16)
    merger = ResidentMerger(model, opened(states))
    for number in range(150):
        merged(merger, model, "ties", ["one"], weight=0.5, density=0.1 + 0.005 * number)
    assert max(len(memory) for _, memory in merger._held._memories.values()) <= 64
    for _ in range(5):
        states["one"]["first"].mul_(1.5)
        merged(merger, model, "ties", ["one"], weight=0.5, density=0.5)
    assert len(merger._held._memories) == 2  # one for each tensor


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_does_not_show(states, threads):
    model, other = Two(torch.bfloat16), Two(torch.bfloat16)
    recipe = make_recipe("base", ["one", "two"], "dare_ties", weight=0.5, density=0.5)
    report = ResidentMerger(model, opened(states)).apply(recipe, threads=threads)
    expected = ResidentMerger(other, opened(states)).apply(recipe)
    assert same(model.values(), other.values())
    assert (report.updated_elements, report.lost_elements) == (expected.updated_elements, expected.lost_elements)


def test_an_error_in_one_tensor_stops_the_merge_and_names_it(states):
    states["one"]["second"][3] = float("nan")
    merger = ResidentMerger(Two(torch.bfloat16), opened(states))
    with pytest.raises(InputError, match="one holds NaN"):
        merger.apply(make_recipe("base", ["one"], "ties", weight=0.5, density=0.5), threads=2)


def test_parameters_that_do_not_lie_in_one_piece_are_filled_all_the_same(states):
    model, plain = Two(torch.bfloat16), Two(torch.bfloat16)
    model.first = torch.nn.Parameter(torch.zeros(70, 30, dtype=torch.bfloat16).T)
    recipe = make_recipe("base", ["one"], "linear", weight=0.5)
    ResidentMerger(model, opened(states)).apply(recipe)
    ResidentMerger(plain, opened(states)).apply(recipe)
    assert same(model.values(), plain.values())


def test_inputs_are_held_where_they_are_computed_on_as_long_as_there_is_room(states, monkeypatch):
    model = Two(torch.bfloat16)
    plan = ResidentMerger(model, opened(states))._plan(make_recipe("base", ["one"], "linear", weight=0.5))
    elsewhere = torch.device("meta")  # stands for an accelerator
    held = resident._Held()
    first = held.read(plan, "one", "first", elsewhere)
    assert first.device == elsewhere
    assert held.read(plan, "one", "first", elsewhere) is first
    states["one"]["first"].mul_(2)
    assert held.read(plan, "one", "first", elsewhere) is not first
    monkeypatch.setattr(resident, "_has_room", lambda device: False)
    second = held.read(plan, "one", "second", elsewhere)
    assert second.device == elsewhere
    assert held.read(plan, "one", "second", elsewhere) is not second
