"""`dapt-merge pretrain` from the command line: the file, the overrides, the output, the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dapt_merge.cli import main


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import sys

    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "pretraining"))
    sys.modules.pop("tiny_corpora", None)
    from tiny_corpora import make_base, notes, write_jsonl

    base = make_base(tmp_path / "base")
    corpus = write_jsonl(tmp_path / "notes.jsonl", notes(40, 1))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"base: {base}\ncorpus: [{corpus}]\nsequence_length: 32\nbatch_tokens: 64\ntokens: 256\ncheckpoints: 2\n"
        f"precision: fp32\ncache_folder: {tmp_path / 'cache'}\n",
        encoding="utf-8",
    )
    return file


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["dapt-merge", "pretrain", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    code = caught.value.code
    return code if isinstance(code, int) else 0


def test_a_run_and_its_json(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert command(monkeypatch, run_file, "tokens=128", "-o", out, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["tokens_seen"] for row in result["checkpoints"]] == [64, 128]
    assert (out / "checkpoint-2" / "model.safetensors").is_file()


def test_the_same_command_says_that_the_run_is_complete(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert command(monkeypatch, run_file, "-o", tmp_path / "run") == 0
    captured = capsys.readouterr()
    assert "is complete; nothing to do" in captured.err
    assert "from the base" in captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["tokenz=3"], "Did you mean 'tokens'?"), (["base=nowhere/at/all"], "no such"), ([], "no output folder")],
)
def test_bad_input_ends_in_exit_code_2_and_a_remedy(
    run_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    out = [] if not arguments else ["-o", run_file.parent / "run"]
    assert command(monkeypatch, run_file, *arguments, *out) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "what to do" in error
    assert "Traceback" not in error
