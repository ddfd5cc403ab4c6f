"""A merge waits for the disk when it is asked to, and goes on after a power cut with nothing that may be lost."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from dapt_merge import merge
from dapt_merge.checkpoints import staging
from dapt_merge.errors import InputError
from dapt_merge.merging import rates, resume, stream
from dapt_merge.merging.copying import copy_seconds, merged_in
from dapt_merge.merging.resume import JOURNAL_FILE

SHARD_BYTES = 100_000


@pytest.fixture
def lazy(tmp_path):
    """Return a merge of 12 tensors, four to a file of the output."""
    folders = []
    for seed, name in enumerate(("base", "dapt")):
        generator = torch.Generator().manual_seed(seed)
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        weights = {f"t.{index:02}": torch.randn(50, 120, generator=generator) for index in range(12)}
        save_file(weights, folders[-1] / "model.safetensors")
    return merge(*folders, "linear", weight=0.5)


@pytest.fixture
def synced(monkeypatch):
    """Return the paths that the disk was waited for, as they come."""
    paths, wait = [], os.fsync

    def noted(descriptor):
        paths.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        wait(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    return paths


def save(lazy, out, threads=2, **settings):
    return lazy.save(out, threads=threads, shard_bytes=SHARD_BYTES, **settings)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("model")}


def interrupted(lazy, out, monkeypatch, **settings):
    """Stop a merge at its seventh tensor, once the first file is noted as finished; return its journal."""
    whole, names = stream.merge_tensor_in_runs, []

    def noted():
        return any(
            path.read_bytes().endswith(b"\n") for path in out.parent.glob(f".{out.name}.partial-*/{JOURNAL_FILE}")
        )

    def merged(job, *arguments, **keywords):
        if len(names) == 6:
            give_up = time.monotonic() + 60  # files are finished by threads of their own, whenever those have a turn
            while not noted() and time.monotonic() < give_up:
                time.sleep(0.01)
            raise KeyboardInterrupt
        names.append(job.name)
        return whole(job, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "merge_tensor_in_runs", merged)
        with pytest.raises(KeyboardInterrupt):
            save(lazy, out, threads=1, **settings)  # else two files may be half done, and none finished
    [folder] = out.parent.glob(f".{out.name}.partial-*")
    return folder / JOURNAL_FILE


def resumed_tensors(lazy, out, **settings):
    return save(lazy, out, **settings).resumed_tensors


def test_a_merge_waits_for_the_disk_only_when_it_is_asked_to(lazy, tmp_path, synced):
    save(lazy, tmp_path / "out")
    assert synced == []
    save(lazy, tmp_path / "flushed", flush=True)
    assert {"merge_report.json", "config.json", "recipe.yaml"} & set(synced)
    assert {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)} <= set(synced)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "flushed")


def test_an_output_that_replaces_another_is_waited_for(lazy, tmp_path, synced):
    save(lazy, tmp_path / "out")
    assert synced == []
    save(lazy, tmp_path / "out", overwrite=True)
    assert "model-00001-of-00003.safetensors" in synced


def test_the_disk_is_waited_for_where_boots_cannot_be_told_apart(lazy, tmp_path, synced, monkeypatch):
    monkeypatch.setattr(resume, "_BOOT_FILE", tmp_path / "none")
    save(lazy, tmp_path / "out")
    assert "model-00001-of-00003.safetensors" in synced


def test_what_was_not_waited_for_counts_until_the_machine_starts_anew(lazy, tmp_path, monkeypatch):
    whole = save(lazy, tmp_path / "whole")
    interrupted(lazy, tmp_path / "out", monkeypatch)
    assert resumed_tensors(lazy, tmp_path / "out") >= 4
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    journal = interrupted(lazy, tmp_path / "again", monkeypatch)
    weights = next(journal.parent.glob("model-*"))
    weights.write_bytes(bytes(weights.stat().st_size))  # what a power cut may leave
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(resume, "_BOOT_FILE", tmp_path / "boot")
    report = save(lazy, tmp_path / "again")
    assert report.resumed_tensors == 0
    assert (report.output, report.inputs) == (whole.output, whole.inputs)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")


def test_what_was_waited_for_counts_after_a_new_start_too(lazy, tmp_path, monkeypatch):
    interrupted(lazy, tmp_path / "out", monkeypatch, flush=True)
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(resume, "_BOOT_FILE", tmp_path / "boot")
    assert resumed_tensors(lazy, tmp_path / "out") >= 4


@pytest.mark.parametrize("spoilt", [b"\0" * 300, b'{"file": "mod', b"\0\0\0\n\0\0\n", b"[1]\n"])
def test_a_journal_that_a_power_cut_spoilt_counts_up_to_there(lazy, tmp_path, monkeypatch, spoilt):
    save(lazy, tmp_path / "whole")
    journal = interrupted(lazy, tmp_path / "out", monkeypatch)
    [*_, last] = lines = journal.read_bytes().splitlines(keepends=True)
    assert json.loads(last)["boot"] == resume.boot_id()
    journal.write_bytes(lines[0] + spoilt)
    assert resumed_tensors(lazy, tmp_path / "out") == 4
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_disk_that_is_full_when_the_page_cache_is_written_is_explained_and_leaves_nothing(
    lazy, tmp_path, monkeypatch
):
    def full(descriptor, content, offset):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging, "_write_at", full)
    monkeypatch.setattr(staging.Staging, "_caches", lambda self: True)
    with pytest.raises(InputError, match="disk is full"):
        save(lazy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_the_speed_of_copying_is_sampled_once_a_day_for_each_way_of_writing(lazy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("dapt_merge.merging.copying._WORTH_A_SAMPLE_BYTES", 0)
    sampled = []

    def sample(plan, folder, threads, nbytes, *, flush):
        sampled.append(flush)
        return 1e-9

    monkeypatch.setattr("dapt_merge.merging.copying.copy_seconds_per_byte", sample)
    for _ in range(2):
        assert copy_seconds(lazy.plan, tmp_path, 2) == pytest.approx(1e-9 * lazy.plan.nbytes)
    assert sampled == [False]
    copy_seconds(lazy.plan, tmp_path, 2, flush=True)
    assert sampled == [False, True]
    copy_seconds(lazy.plan, tmp_path, 1)
    assert sampled == [False, True, False]
    merged_in(1e-10 * lazy.plan.nbytes, lazy.plan, tmp_path, 2)
    merged_in(1e-8 * lazy.plan.nbytes, lazy.plan, tmp_path, 1)
    assert copy_seconds(lazy.plan, tmp_path, 2) == pytest.approx(1e-10 * lazy.plan.nbytes), "a merge was faster"
    assert copy_seconds(lazy.plan, tmp_path, 1) == pytest.approx(1e-9 * lazy.plan.nbytes), "a slower one tells nothing"
    assert sampled == [False, True, False]
    monkeypatch.setattr(rates, "_DAY_SECONDS", 0)
    copy_seconds(lazy.plan, tmp_path, 2)
    assert sampled == [False, True, False, False]


@pytest.mark.slow
def test_a_command_that_leaves_at_once_has_said_everything(lazy, tmp_path):
    script = "import sys, atexit; from dapt_merge.cli import main; atexit.register(print, 'the end'); main()"
    flags = ["--base", "base", "--dapt", "dapt", "--method", "linear", "--weight", "0.5"]
    command = [sys.executable, "-c", script, "merge", *flags]
    done = subprocess.run([*command, "-o", "out", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True)
    report, _, end = done.stdout.rpartition("}\n")
    assert json.loads(report + "}")["tensors"] == 12
    assert end == "the end\n"
    refused = subprocess.run([*command, "-o", "out"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    with subprocess.Popen(
        [*command, "-o", "piped", "--json"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()  # like `head`, which has gone
        assert b"Traceback" not in process.stderr.read()
