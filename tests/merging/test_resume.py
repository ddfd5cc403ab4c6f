"""An interrupted merge goes on at its next unfinished file, and ends in the bytes of one that was not interrupted."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapt_merge import merge, open_checkpoint
from dapt_merge.checkpoints import CheckpointWriter, TensorInfo
from dapt_merge.errors import InputError
from dapt_merge.merging import stream
from dapt_merge.merging.resume import JOURNAL_FILE
from dapt_merge.tensors.dtypes import Dtype

SHARD_BYTES = 100_000
MERGE = f"""
import sys, time
from dapt_merge import merge
from dapt_merge.merging import stream
base, dapt, out, method, slowly = sys.argv[1:]
merged = stream.merge_tensor_in_runs
def late(*arguments, **keywords):
    time.sleep(float(slowly))
    return merged(*arguments, **keywords)
stream.merge_tensor_in_runs = late
merge(base, dapt, method, weight=0.5, density=0.5, seed=1).save(out, threads=2, shard_bytes={SHARD_BYTES})
"""


class Interrupted(KeyboardInterrupt):
    """What Ctrl-C raises, told apart from a real one."""


@pytest.fixture
def inputs(tmp_path):
    """Return two folders with 12 tensors each, four to a file of the output."""
    folders = []
    for seed, name in enumerate(("base", "dapt")):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        generator = torch.Generator().manual_seed(seed)
        weights = {f"t.{index:02}": torch.randn(50, 120, generator=generator) for index in range(12)}
        save_file(weights, folders[-1] / "model.safetensors")
    return folders


def save(inputs, out, threads=2, **settings):
    lazy = merge(*inputs, "dare_ties", **{"weight": 0.5, "density": 0.5, "seed": 1} | settings)
    return lazy.save(out, threads=threads, shard_bytes=SHARD_BYTES)


def interrupt_after(monkeypatch, tensors, error=Interrupted):
    """Let merges fail at the given tensor; return the list of the tensors merged from now on."""
    whole, names = stream.merge_tensor_in_runs, []

    def merged(job, *arguments, **keywords):
        if len(names) >= tensors:
            raise error("pulled out")
        names.append(job.name)
        return whole(job, *arguments, **keywords)

    monkeypatch.setattr(stream, "merge_tensor_in_runs", merged)
    return names


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("model")}


def partial_folders(folder):
    return sorted(folder.glob(".out.partial-*"))


def test_an_interrupted_merge_goes_on_at_the_next_unfinished_file(inputs, tmp_path, monkeypatch):
    whole = save(inputs, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        with pytest.raises(Interrupted):
            save(inputs, tmp_path / "out", threads=1)  # of two, one may be overtaken on the first file's last tensor
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        done = interrupt_after(patch, 100)
        resumed = save(inputs, tmp_path / "out")
    assert 0 < len(done) < 12, "the first file was not made again"
    assert not {"t.00", "t.01", "t.02", "t.03"} & set(done)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert (resumed.output, resumed.inputs) == (whole.output, whole.inputs)
    assert (resumed.lost_elements, resumed.notes) == (whole.lost_elements, whole.notes)
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert JOURNAL_FILE not in left
    assert ".lock" not in left
    assert not partial_folders(tmp_path)


@pytest.mark.parametrize("change", ["recipe", "seed", "input", "shards"])
def test_what_another_merge_left_is_never_taken_over(inputs, tmp_path, monkeypatch, change):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        with pytest.raises(Interrupted):
            save(inputs, tmp_path / "out")
    [left] = partial_folders(tmp_path)
    if change == "input":
        weights = inputs[1] / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-100] ^= 1
        times = weights.stat()
        weights.write_bytes(content)
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # size and date as before
    settings = {"recipe": {"weight": 0.25}, "seed": {"seed": 2}}.get(change, {})
    done = interrupt_after(monkeypatch, 100)
    if change == "shards":
        merge(*inputs, "dare_ties", weight=0.5, density=0.5, seed=1).save(tmp_path / "out", shard_bytes=60_000)
    else:
        save(inputs, tmp_path / "out", **settings)
    assert len(done) == 12
    assert not left.exists(), "it is removed, since nobody can go on with it"


def test_an_error_leaves_nothing_to_go_on_with(inputs, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 6, OSError)
    with pytest.raises(OSError, match="pulled out"):
        save(inputs, tmp_path / "out")
    assert not partial_folders(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_journal_that_the_kill_cut_off_counts_up_to_its_last_whole_line(inputs, tmp_path, monkeypatch):
    save(inputs, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 10)
        with pytest.raises(Interrupted):
            save(inputs, tmp_path / "out")
    [left] = partial_folders(tmp_path)
    journal = left / JOURNAL_FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + b'{"file": "model-0000')
    done = interrupt_after(monkeypatch, 100)
    save(inputs, tmp_path / "out")
    assert len(done) == 8
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_second_process_does_not_touch_the_folder_of_a_running_one(inputs, tmp_path):
    running = start(inputs, tmp_path / "out", slowly=0.2)
    wait_for_file(tmp_path, running)
    running.send_signal(signal.SIGSTOP)
    with pytest.raises(InputError, match="another process"):
        save(inputs, tmp_path / "out")
    other = save(inputs, tmp_path / "out", seed=3)  # another merge to the same place may go first
    running.send_signal(signal.SIGCONT)
    assert running.wait() != 0
    assert "exists already" in running.stderr.read()
    assert open_checkpoint(tmp_path / "out").fingerprint() == other.output


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_merge_killed_again_and_again_ends_in_the_same_bytes(inputs, tmp_path, method):
    merge(*inputs, method, weight=0.5, **({} if method == "linear" else {"density": 0.5})).save(
        tmp_path / "whole", shard_bytes=SHARD_BYTES
    )
    finished = 0
    for _ in range(2):
        process = start(inputs, tmp_path / "out", slowly=0.1, method=method)
        finished = wait_for_file(tmp_path, process, at_least=finished + 1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    last = start(inputs, tmp_path / "out", slowly=0, method=method)
    assert last.wait() == 0, last.stderr.read()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not partial_folders(tmp_path)


def start(inputs, out, slowly, method="dare_ties"):
    arguments = [*map(str, inputs), str(out), method, str(slowly)]
    script = MERGE.replace("density=0.5, ", "") if method == "linear" else MERGE
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_file(folder, process, at_least=1):
    """Wait until the journal of a running merge counts so many files; return how many it counts."""
    while process.poll() is None:
        for journal in folder.glob(f".out.partial-*/{JOURNAL_FILE}"):
            lines = journal.read_bytes().count(b"\n")
            if lines >= at_least:
                return lines
        time.sleep(0.005)
    raise AssertionError(process.stderr.read())


def test_a_merge_of_models_in_memory_has_nothing_to_go_on_with_and_leaves_nothing(inputs, tmp_path, monkeypatch):
    in_memory = [load_file(folder / "model.safetensors") for folder in inputs]
    interrupt_after(monkeypatch, 6)
    with pytest.raises(Interrupted):
        save(in_memory, tmp_path / "out")
    assert not partial_folders(tmp_path)


def test_finished_files_are_laid_out_but_not_opened_again(tmp_path):
    specs = [TensorInfo(f"t.{index}", Dtype.FLOAT32, (10,), 40) for index in range(4)]
    tensors = {spec.name: torch.full((10,), float(index)) for index, spec in enumerate(specs)}
    with CheckpointWriter(tmp_path, specs, shard_bytes=80) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    before = files_of(tmp_path)
    with CheckpointWriter(tmp_path, specs, shard_bytes=80, finished_files=writer.files[:1]) as again:
        for name in ("t.2", "t.3"):
            again.write(name, tensors[name])
    assert files_of(tmp_path) == before
