"""The heat map: layers down, groups across, the measures that exist, the same file for the same numbers."""

import pytest
import torch

from dapt_merge import open_checkpoint
from dapt_merge.errors import InputError
from dapt_merge.inspection import inspect_checkpoints
from dapt_merge.reports.heat_map import _draw, _percent, panels, save_heat_map


def inspected(*scales, layers=3, rank=True):
    generator = torch.Generator().manual_seed(0)
    names = ["model.embed_tokens.weight", *(f"model.layers.{n}.mlp.up_proj.weight" for n in range(layers))]
    base = {name: torch.randn(6, 6, generator=generator) for name in names}
    dapt = [{n: t + scale * torch.randn(6, 6, generator=generator) for n, t in base.items()} for scale in scales]
    opened = [open_checkpoint(tensors, f"runs/dapt-{k}") for k, tensors in enumerate(dapt)]
    return inspect_checkpoints(open_checkpoint(base, "models/base"), opened, rank=rank)


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_equal_numbers_give_equal_files(tmp_path, kind):
    found = inspected(0.1)
    one, two = save_heat_map(found, tmp_path / f"one.{kind}"), save_heat_map(found, tmp_path / f"two.{kind}")
    assert one.read_bytes() == two.read_bytes()


def test_a_panel_is_drawn_only_where_its_measure_exists():
    def titles(found):
        return " ".join(panel.title for panel in panels(found))

    assert "rank" in titles(inspected(0.1))
    assert "rank" not in titles(inspected(0.1, rank=False))
    assert "signs" in titles(inspected(0.1, 0.2))
    assert "signs" not in titles(inspected(0.1))


def test_the_picture_has_a_row_for_each_layer_and_a_column_for_each_group():
    figure = _draw(inspected(0.1, 0.2))
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["outside", "layer 0", "1", "2"]
    assert [label.get_text() for label in first.get_xticklabels()] == ["mlp", "embedding"]
    assert len(first.texts) == 4


def test_several_checkpoints_stand_beside_each_other_on_one_scale_and_the_rest_is_the_last_ones():
    figure = _draw(inspected(0.1, 0.4))
    titles = [axes.get_title().split("\n") for axes in figure.axes if axes.get_title()]
    assert [title[-1] for title in titles if "size" in title[0]] == ["dapt-0", "dapt-1"]
    assert [title[-1] for title in titles if "lost" in title[0]] == ["dapt-1"]
    assert [title for title in titles if "signs" in title[0]] == [["signs that agree", "among all δ"]]
    first, second = (axes.images[0].norm for axes in figure.axes[:2])
    assert first is second


def test_what_is_the_same_everywhere_is_said_and_not_drawn():
    figure = _draw(inspected(0.1))
    assert "elements changed: 100% everywhere" in figure.get_suptitle()
    assert not any("elements changed" in axes.get_title() for axes in figure.axes)


def test_of_a_long_run_the_checkpoints_are_taken_evenly_with_first_and_last():
    figure = _draw(inspected(*(0.01 * step for step in range(1, 16)), rank=False))
    names = [axes.get_title().split("\n")[-1] for axes in figure.axes if "size" in axes.get_title()]
    assert (names[0], names[-1], len(names)) == ("dapt-0", "dapt-14", 8)


def test_equal_checkpoints_and_many_layers_can_be_drawn(tmp_path):
    assert save_heat_map(inspected(0.0), tmp_path / "equal.png").exists()
    assert not _draw(inspected(0.1, layers=60, rank=False)).axes[0].texts


def test_small_percentages_do_not_become_zero():
    assert [_percent(value) for value in (0.0, 0.004, 0.5, 12.3, 100.0)] == ["0", "0.0040", "0.50", "12", "100"]


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot draw"):
        save_heat_map(inspected(0.1), tmp_path / "map.jpeg")
