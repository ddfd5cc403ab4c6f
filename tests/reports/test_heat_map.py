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
    assert {axes.get_ylabel() for axes in figure.axes} >= {"dapt-0", "dapt-1"}


def test_equal_checkpoints_and_many_layers_can_be_drawn(tmp_path):
    assert save_heat_map(inspected(0.0), tmp_path / "equal.png").exists()
    assert not _draw(inspected(0.1, layers=60, rank=False)).axes[0].texts


def test_small_percentages_do_not_become_zero():
    assert [_percent(value) for value in (0.0, 0.004, 0.5, 12.3, 100.0)] == ["0.0", "0.004", "0.5", "12", "100"]


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot draw"):
        save_heat_map(inspected(0.1), tmp_path / "map.jpeg")
