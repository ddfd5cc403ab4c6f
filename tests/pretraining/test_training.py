"""A run: what it writes, what it refuses, and that a kill at any moment changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Stop, assert_same_weights, log_of, stop_at, train, weights
from tiny_corpora import make_base, notes, write_jsonl

from dapt_merge.errors import DaptMergeError, InputError
from dapt_merge.pretraining import RunPaused, training


def test_a_run_leaves_ordinary_checkpoints_and_a_log(settings: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seen: list[tuple[int, int]] = []
    lines: list[dict[str, Any]] = []
    folders = train(settings, on_progress=lambda done, total: seen.append((done, total)), on_log=lines.append)
    run = Path(settings["output"])
    assert [folder.name for folder in folders] == ["checkpoint-3", "checkpoint-6"]
    assert sorted(entry.name for entry in run.iterdir()) == [
        ".lock",
        "checkpoint-3",
        "checkpoint-6",
        "corpus",
        "log.jsonl",
        "run.json",
        "tensorboard",
    ]
    assert {entry.name for entry in (run / "corpus").iterdir()} == {"manifest.json", "manifest.md", "removed.jsonl"}
    assert seen == [(64 * step, 384) for step in range(7)]
    assert log_of(run) == lines
    figures = {"step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
    assert set(lines[0]) == figures | {"model_teraflops_per_second"}
    model = AutoModelForCausalLM.from_pretrained(folders[-1])
    assert model.config.use_cache
    assert len({file.stat().st_mode for file in folders[-1].iterdir()}) == 1
    assert AutoTokenizer.from_pretrained(folders[-1]).eos_token_id == 0


def test_a_checkpoint_tells_how_far_it_went(settings: dict[str, Any], base: Path) -> None:
    folders = train(settings)
    details = json.loads((folders[-1] / "dapt_checkpoint.json").read_text())
    before, after = weights(base), weights(folders[-1])
    delta = sum(float((after[name].double() - before[name].double()).square().sum()) for name in before)
    norm = sum(float(before[name].double().square().sum()) for name in before)
    assert details["relative_delta_norm"] == pytest.approx((delta / norm) ** 0.5, rel=1e-9)
    assert details["relative_delta_norm"] > 0
    assert (details["step"], details["tokens_seen"], details["seed"]) == (6, 384, 0)
    assert details["base_fingerprint"].startswith("xxh3:")
    assert details["config"]["learning_rate"] == 1e-3


@pytest.mark.parametrize("precision", ["bf16-master", pytest.param("fp32", marks=pytest.mark.slow), "bf16-autocast"])
def test_every_precision_learns_and_saves_float32(settings: dict[str, Any], precision: str) -> None:
    overrides = [f"precision={precision}", "tokens=1280", "learning_rate=1e-2", "micro_batch_tokens=32"]
    folders = train(settings, *overrides)
    lines = log_of(Path(settings["output"]))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert all(line["grad_norm"] > 0 for line in lines)
    assert {tensor.dtype for tensor in weights(folders[-1]).values()} == {torch.float32}
    assert json.loads((folders[-1] / "config.json").read_text())["dtype"] == "float32"
    # Weights that had been through bfloat16 would have their low 16 bits empty.
    bits = torch.cat([tensor.flatten() for tensor in weights(folders[-1]).values()]).view(torch.int32)
    assert bool(((bits & 0xFFFF) != 0).any())


def test_micro_batches_change_the_loss_by_rounding_only(settings: dict[str, Any], tmp_path: Path) -> None:
    train(settings)
    whole = log_of(Path(settings["output"]))
    train({**settings, "output": str(tmp_path / "micro")}, "micro_batch_tokens=32")
    for one, other in zip(whole, log_of(tmp_path / "micro"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_replay_is_counted(settings: dict[str, Any], tmp_path: Path) -> None:
    replay = write_jsonl(tmp_path / "replay.jsonl", notes(40, 7))
    corpus = [*settings["corpus"], {"path": str(replay), "role": "replay"}]
    folders = train({**settings, "corpus": corpus, "replay_share": 0.25})
    details = json.loads((folders[-1] / "dapt_checkpoint.json").read_text())
    assert (details["domain_tokens"], details["replay_tokens"]) == (288, 96)


@pytest.mark.parametrize(
    ("overrides", "rates"),
    [
        (["schedule=constant", "warmup_share=0"], [1, 1, 1, 1, 1, 1]),
        (["schedule=linear", "warmup_share=0"], [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        (["schedule=constant", "warmup_share=0.5"], [0, 1 / 3, 2 / 3, 1, 1, 1]),
        (["schedule=wsd", "warmup_share=0", "decay_share=0.5"], [1, 1, 1, 1, 0.75, 0.25]),
        (["schedule=cosine", "warmup_share=0", "minimum_rate_share=0.5"], [1, None, None, 0.75, None, None]),
    ],
)
def test_the_learning_rate_follows_the_schedule(
    settings: dict[str, Any], overrides: list[str], rates: list[float | None]
) -> None:
    train(settings, *overrides)
    for line, rate in zip(log_of(Path(settings["output"])), rates, strict=True):
        if rate is not None:
            assert line["learning_rate"] == pytest.approx(1e-3 * rate, abs=1e-9)


def test_a_complete_run_is_left_as_it_is(settings: dict[str, Any]) -> None:
    folders = train(settings)
    before = {path: path.stat().st_mtime_ns for path in Path(settings["output"]).rglob("*") if path.is_file()}
    told: list[str] = []
    assert train(settings, on_note=told.append) == folders
    assert any("is complete" in text for text in told)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_run_in_the_same_folder_is_refused_unless_overwritten(settings: dict[str, Any]) -> None:
    train(settings)
    with pytest.raises(InputError, match=r"'learning_rate' \(0.001 there, 0.01 now\)"):
        train(settings, "learning_rate=0.01")
    train(settings, "learning_rate=0.01", overwrite=True)
    assert log_of(Path(settings["output"]))[0]["learning_rate"] == 0.01


def test_a_changed_corpus_is_another_run_and_a_moved_one_is_not(settings: dict[str, Any], tmp_path: Path) -> None:
    folders = train(settings)
    moved = Path(settings["corpus"][0]).rename(tmp_path / "elsewhere.jsonl")
    assert train({**settings, "corpus": [str(moved)]}) == folders
    write_jsonl(moved, notes(40, 9))
    with pytest.raises(InputError, match="it differs in 'corpus'"):
        train({**settings, "corpus": [str(moved)]})


def test_a_folder_that_is_no_run_is_never_replaced(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="no DAPT run"):
            train({**settings, "output": str(tmp_path / "thesis")}, overwrite=overwrite)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"


def test_more_checkpoints_than_steps_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="7 checkpoints were asked for, but the budget makes 6 steps"):
        train(settings, "checkpoints=7")


def test_blocks_longer_than_the_model_reads_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="at most 128 tokens"):
        train(settings, "sequence_length=256", "batch_tokens=256")


def test_a_tokenizer_of_another_model_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    small = make_base(tmp_path / "small", vocab_size=100)
    with pytest.raises(InputError, match="the model's vocabulary has 100"):
        train({**settings, "base": str(small)})


def test_a_model_that_mixes_documents_is_refused_with_what_it_can_do(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dapt_merge.pretraining.loss.keeps_documents_apart", lambda model, rows=1: rows == 1)
    with pytest.raises(InputError, match="only for one sequence at a time") as caught:
        train(settings)
    assert str(caught.value.remedy).startswith("Set micro_batch_tokens: 32")
    assert train(settings, "micro_batch_tokens=32", "checkpoints=1")
    monkeypatch.setattr("dapt_merge.pretraining.loss.keeps_documents_apart", lambda model, rows=1: False)
    with pytest.raises(InputError, match="cannot be kept within documents"):
        train({**settings, "learning_rate": 2e-3}, overwrite=True)


def test_divergence_ends_the_run_with_a_remedy(settings: dict[str, Any]) -> None:
    with pytest.raises(DaptMergeError, match="training diverged") as caught:
        train(settings, "learning_rate=1e30", "gradient_clip=1e30")
    assert "learning_rate" in str(caught.value.remedy)


def test_precision_falls_back_only_when_it_is_automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(training, "_multiplies_bfloat16", lambda: False)
    assert training.resolve_precision("auto", told.append) == "fp32"
    assert training.resolve_precision("bf16-master", told.append) == "bf16-master"
    assert len(told) == 2
    assert all("no bfloat16" in text for text in told)
    monkeypatch.setattr(training, "_multiplies_bfloat16", lambda: True)
    assert training.resolve_precision("auto", told.append) == "bf16-master"
    assert len(told) == 2


VARIANTS = {
    "fp32": ("precision=fp32",),
    "bf16-master": ("precision=bf16-master", "micro_batch_tokens=32"),
    "wsd": ("schedule=wsd", "decay_share=0.5", "warmup_share=0.2"),
    "adafactor": ("optimizer=adafactor", "precision=bf16-master"),
    "towards-base": ("decay_towards=base", "weight_decay=10"),
}


@pytest.mark.parametrize(
    ("variant", "step"),
    [
        ("bf16-master", 3),
        pytest.param("fp32", 1, marks=pytest.mark.slow),
        pytest.param("wsd", 5, marks=pytest.mark.slow),
        pytest.param("adafactor", 3, marks=pytest.mark.slow),
        pytest.param("towards-base", 3, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_ends_with_the_same_weights(
    settings: dict[str, Any], tmp_path: Path, variant: str, step: int
) -> None:
    overrides = [*VARIANTS[variant], "checkpoints=3"]
    whole = train({**settings, "output": str(tmp_path / "whole")}, *overrides)
    with pytest.raises(Stop):
        train(settings, *overrides, on_log=stop_at(step))
    lines: list[dict[str, Any]] = []
    folders = train(settings, *overrides, on_log=lines.append)
    assert [line["step"] for line in lines] == list(range(step - step % 2 + 1, 7))
    for one, other in zip(whole, folders, strict=True):
        assert_same_weights(one, other)
    assert [line["step"] for line in log_of(Path(settings["output"]))] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "why",
    [
        "time",
        pytest.param("termination", marks=pytest.mark.slow),
        "Ctrl-C",
        pytest.param("minutes", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_from_between_its_checkpoints(settings: dict[str, Any], tmp_path: Path, why: str) -> None:
    """The time limit, SIGTERM and Ctrl-C save and stop; every so many minutes the state is saved without stopping."""
    overrides = ["checkpoints=1", "precision=bf16-master"]
    whole = train({**settings, "output": str(tmp_path / "whole")}, *overrides)
    run = Path(settings["output"])
    if why == "minutes":
        with pytest.raises(Stop):
            train(settings, *overrides, "save_every_minutes=1e-9", on_log=stop_at(4))
    else:
        sent = {"termination": signal.SIGTERM, "Ctrl-C": signal.SIGINT}

        def end(line: dict[str, Any]) -> None:
            if why in sent and line["step"] == 3:
                os.kill(os.getpid(), sent[why])

        said = "the time was up" if why == "time" else "the run was told to end"
        limit = 0.1 if why == "time" else None
        with pytest.raises(RunPaused, match=rf"{said} after step \d of 6") as caught:
            train(settings, *overrides, time_limit_seconds=limit, on_log=end)
        assert caught.value.exit_code == 75
    assert not list(run.glob("checkpoint-*"))
    lines: list[dict[str, Any]] = []
    assert_same_weights(whole[-1], train(settings, *overrides, on_log=lines.append)[-1])
    assert lines[0]["step"] == {"time": 2, "minutes": 5}.get(why, 5)
    assert [line["step"] for line in log_of(run)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("grid", "steps"), [("{every_tokens: 150}", [3, 5, 6]), ("{at_tokens: [64, 300]}", [1, 5, 6]), ("2", [3, 6])]
)
def test_checkpoints_lie_on_a_grid_of_tokens(settings: dict[str, Any], grid: str, steps: list[int]) -> None:
    folders = train(settings, f"checkpoints={grid}")
    assert [folder.name for folder in folders] == [f"checkpoint-{step}" for step in steps]


def test_a_checkpoint_past_the_end_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="up to 5,000 tokens"):
        train(settings, "checkpoints={at_tokens: [5000]}")


@pytest.mark.slow
def test_checkpointed_gradients_are_the_same_gradients(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = train(settings)
    assert_same_weights(
        whole[-1], train({**settings, "output": str(tmp_path / "gc")}, "gradient_checkpointing=true")[-1]
    )


def test_the_memory_light_optimizer_learns_and_keeps_no_square_for_each_weight(settings: dict[str, Any]) -> None:
    train(settings, "optimizer=adafactor", "tokens=1280", "learning_rate=1e-2", "checkpoints=2", on_log=None)
    lines = log_of(Path(settings["output"]))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5


@pytest.mark.parametrize("precision", ["bf16-master", pytest.param("fp32", marks=pytest.mark.slow)])
def test_weight_decay_towards_the_base_keeps_the_model_near_it(
    settings: dict[str, Any], tmp_path: Path, precision: str
) -> None:
    moved = []
    for number, strength in enumerate([1e-9, 100.0, 900.0]):
        folders = train(
            {**settings, "output": str(tmp_path / str(number))},
            "decay_towards=base",
            f"weight_decay={strength}",
            f"precision={precision}",
            "schedule=constant",
            "warmup_share=0",
        )
        moved.append(json.loads((folders[-1] / "dapt_checkpoint.json").read_text())["relative_delta_norm"])
    # With lr · λ = 0.9 a step forgets nine tenths of the way that was gone before it.
    assert moved[0] > moved[1] > moved[2] > 0
    assert moved[0] > 2 * moved[2]


@pytest.mark.slow
def test_a_checkpoint_whose_state_was_lost_is_made_again(settings: dict[str, Any], tmp_path: Path) -> None:
    """A kill between the checkpoint and its state leaves the newest checkpoint one ahead of the state."""
    whole = train({**settings, "output": str(tmp_path / "whole")}, "checkpoints=3")
    run = Path(settings["output"])

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            os.rename(run / "resume", tmp_path / "state-of-step-2")
        if line["step"] == 4:
            raise Stop

    with pytest.raises(Stop):
        train(settings, "checkpoints=3", on_log=stop)
    os.rename(run / "resume", tmp_path / "lost")
    os.rename(tmp_path / "state-of-step-2", run / "resume")
    lines: list[dict[str, Any]] = []
    folders = train(settings, "checkpoints=3", on_log=lines.append)
    assert lines[0]["step"] == 3
    assert_same_weights(whole[-1], folders[-1])


def test_a_folder_in_use_is_refused(settings: dict[str, Any]) -> None:
    def start_again(line: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="another process is training"):
            train(settings)
        raise Stop

    with pytest.raises(Stop):
        train(settings, on_log=start_again)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bf16-master", "wsd", "lora"])
def test_kills_at_any_moment_change_nothing(settings: dict[str, Any], tmp_path: Path, variant: str) -> None:
    """A real SIGKILL, again and again at different moments, until the run is complete."""
    special = {**VARIANTS, "lora": ("adapter.rank=2", "adapter.dropout=0.1")}[variant]
    overrides = [*special, "tokens=2304", "checkpoints=12", f"cache_folder={tmp_path / 'cache'}"]
    whole = train({**settings, "output": str(tmp_path / "whole")}, *overrides)
    run = Path(settings["output"])
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    script = (
        "import json, sys; from dapt_merge.pretraining import load_pretrain_config, pretrain;"
        f"pretrain(load_pretrain_config(json.load(open({str(tmp_path / 'settings.json')!r})), {overrides!r}))"
    )
    kills = 0
    for attempt in range(60):
        child = subprocess.Popen([sys.executable, "-c", script])
        reached = len(list(run.glob("checkpoint-*")))
        while child.poll() is None and len(list(run.glob("checkpoint-*"))) < reached + 3:
            time.sleep(0.001)
        # Another few milliseconds each time, so that the kill falls into writing, renaming and training alike.
        time.sleep(0.003 * (attempt % 7))
        if child.poll() is not None:
            assert child.returncode == 0
            break
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
        for folder in run.glob("checkpoint-*"):
            assert (folder / "dapt_checkpoint.json").is_file()
            weights(folder)
    assert kills >= 3
    folders = train(settings, *overrides)
    assert [folder.name for folder in folders] == [folder.name for folder in whole]
    for one, other in zip(whole, folders, strict=True):
        assert_same_weights(one, other)
    assert [line["step"] for line in log_of(run)] == list(range(1, 37))
    assert not (run / "resume").exists()
