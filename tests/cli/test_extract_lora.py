"""`dapt-merge extract-lora` through the real entry point."""

import json

import pytest
import torch

from dapt_merge.cli import build_app


@pytest.fixture
def folders(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "merged")
    return tmp_path


def run(*arguments):
    from typer.testing import CliRunner

    return CliRunner().invoke(build_app(), ["extract-lora", *map(str, arguments)], catch_exceptions=False)


def test_it_writes_an_adapter_and_prints_the_energy_by_layer(folders):
    result = run(folders / "base", folders / "merged", "--rank", 2, "-o", folders / "lora")
    assert result.exit_code == 0
    assert "energy kept" in result.stdout
    assert {"adapter_config.json", "adapter_model.safetensors"} == {p.name for p in (folders / "lora").iterdir()}


def test_json_is_one_document(folders):
    result = run(folders / "base", folders / "merged", "--rank", 2, "-o", folders / "lora", "--json", "--keep-whole")
    account = json.loads(result.stdout)
    assert account["rank"] == 2
    assert 0 < account["kept"] < 1
    assert account["left_out"] == {}


def test_what_is_kept_of_the_matrices_and_of_the_whole_are_told_apart(folders):
    result = run(folders / "base", folders / "merged", "--rank", 16, "-o", folders / "lora", "--json")
    account = json.loads(result.stdout)
    assert account["kept_of_matrices"] == pytest.approx(1, abs=1e-4)
    assert account["kept"] + account["left_out_share"] == pytest.approx(1, abs=1e-4)
    assert 0.05 < account["left_out_share"] < 0.95
    shown = run(folders / "base", folders / "merged", "--rank", 16, "-o", folders / "again")
    assert "100.0% of their difference kept" in shown.stdout
    assert f"they hold {account['left_out_share']:.1%} of the model's difference" in " ".join(shown.stderr.split())


def test_whoever_may_read_the_settings_may_read_the_weights(folders):
    run(folders / "base", folders / "merged", "--rank", 2, "-o", folders / "lora")
    modes = {path.stat().st_mode for path in (folders / "lora").iterdir()}
    assert len(modes) == 1
