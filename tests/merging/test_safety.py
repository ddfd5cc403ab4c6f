"""Nothing is lost and nothing half-written: kills, full disks, existing outputs; memory stays bounded."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from merging_models import load_weights
from safetensors.torch import save_file

from dapt_merge import merge, open_checkpoint
from dapt_merge.errors import InputError

MERGE = """
import sys
from dapt_merge import merge
base, dapt, out, *rest = sys.argv[1:]
merge(base, dapt, "dare_ties", weight=0.5, density=0.5, seed=1).save(out, threads=2)
"""
MEASURE = """
import sys, threading, time
import torch
from dapt_merge import merge
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024
torch.ones(2) @ torch.ones(2)
base, dapt, out = sys.argv[1:]
lazy = merge(base, dapt, "ties", weight=0.5, density=0.5, out_dtype="bfloat16")
before, highest, running = anonymous(), 0, True
def watch():
    global highest
    while running:
        highest = max(highest, anonymous())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
lazy.save(out, threads=2)
running = False
watcher.join()
print(highest - before)
"""


def start(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def save_large(folder, seed, tensors, elements):
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    weights = {f"t.{index}": torch.randn(elements, generator=generator) for index in range(tensors)}
    save_file(weights, folder / "model.safetensors")
    return folder


def test_an_existing_output_stays_unless_overwriting_is_asked_for(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("kept")
    lazy = merge(models["base"], models["one"], "linear", weight=0.5)
    with pytest.raises(InputError, match="exists already"):
        lazy.save(tmp_path / "out")
    assert (tmp_path / "out" / "precious.txt").read_text() == "kept"
    lazy.save(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious.txt").exists()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_failed_merge_leaves_the_existing_output_and_nothing_else(models, tmp_path, monkeypatch):
    lazy = merge(models["base"], models["one"], "linear", weight=0.5)
    lazy.save(tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    nan = {name: torch.full_like(tensor, float("nan")) for name, tensor in load_weights(models["one"]).items()}
    with pytest.raises(InputError):
        merge(models["base"], nan, "linear", weight=0.5).save(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("place", ["itself", "its parent"])
def test_an_output_that_would_replace_an_input_is_refused(tmp_path, place):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    folders = [save_large(inputs / name, seed, 1, 10) for seed, name in enumerate(("base", "dapt"))]
    lazy = merge(*folders, "linear", weight=0.5)
    with pytest.raises(InputError, match="own input"):
        lazy.save(folders[1] if place == "itself" else inputs, overwrite=True)
    assert all((folder / "model.safetensors").is_file() for folder in folders)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_a_killed_merge_leaves_nothing_under_its_name_and_the_same_command_finishes(tmp_path, share):
    base, dapt = (save_large(tmp_path / name, seed, 40, 500_000) for seed, name in enumerate(("base", "dapt")))
    inputs = [open_checkpoint(folder).fingerprint() for folder in (base, dapt)]
    process = start(MERGE, base, dapt, tmp_path / "out")
    partial = wait_for_partial(tmp_path, process)
    # Blocks are reserved up front, so what has been computed shows in the file's content, not its size.
    weights = partial / "model.safetensors"
    while process.poll() is None and share > 0 and filled_share(weights) < share:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the merge ended before it was killed"
    assert not (tmp_path / "out").exists()
    assert [open_checkpoint(folder).fingerprint() for folder in (base, dapt)] == inputs

    again = start(MERGE, base, dapt, tmp_path / "out")
    assert again.wait() == 0, again.stderr.read()
    expected = merge(base, dapt, "dare_ties", weight=0.5, density=0.5, seed=1)
    written = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(written.read(name), expected[name]) for name in expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "dapt", "out"]


def wait_for_partial(folder, process):
    while process.poll() is None:
        found = list(folder.glob(".out.partial-*"))
        if found and (found[0] / "model.safetensors").exists():
            return found[0]
        time.sleep(0.001)
    raise AssertionError(process.stderr.read())


def filled_share(file, samples=100):
    size = file.stat().st_size
    if size < 20_000:
        return 0.0  # the file exists, but has not got its final length yet
    with open(file, "rb") as content:
        filled = 0
        for index in range(samples):
            content.seek(10_000 + index * (size - 20_000) // samples)
            filled += any(content.read(16))
    return filled / samples


@pytest.mark.slow
def test_memory_follows_the_largest_tensor_and_not_the_model(tmp_path):
    elements = 4_000_000
    used = {}
    for count in (6, 24):
        base, dapt = (
            save_large(tmp_path / f"{name}{count}", seed, count, elements) for seed, name in enumerate(("base", "dapt"))
        )
        process = start(MEASURE, base, dapt, tmp_path / f"out{count}")
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        used[count] = int(output)
    tensor = 4 * elements
    assert used[24] < 10 * tensor, "of 48 tensors read"
    assert used[24] < used[6] + 3 * tensor


@pytest.mark.slow
def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path):
    base, dapt = (save_large(tmp_path / name, seed, 4, 500_000) for seed, name in enumerate(("base", "dapt")))
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted")
    try:
        with pytest.raises(InputError, match="disk is full"):
            merge(base, dapt, "linear", weight=0.5).save(disk / "out")
        assert not list(disk.iterdir())
        merge(base, dapt, "linear", weight=0.5, out_dtype="bfloat16").save(tmp_path / "out")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


SLOWLY = """
import sys, time
from dapt_merge.cli import main
from dapt_merge.merging import stream
merged = stream.merge_tensor_in_runs
def late(*arguments, **keywords):
    time.sleep(0.05)
    return merged(*arguments, **keywords)
stream.merge_tensor_in_runs = late
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("accident", ["deleted", "replaced", "growing"])
def test_an_input_that_vanishes_or_changes_on_the_way_is_told_and_leaves_nothing(tmp_path, accident):
    base, dapt = (save_large(tmp_path / name, seed, 60, 100_000) for seed, name in enumerate(("base", "dapt")))
    flags = ["--base", base, "--dapt", dapt, "--method", "dare_ties", "--weight", "0.5", "density=0.5"]
    process = start(SLOWLY, "merge", *flags, "-o", tmp_path / "out")
    wait_for_partial(tmp_path, process)
    weights = dapt / "model.safetensors"
    if accident == "deleted":
        weights.unlink()
    elif accident == "replaced":
        (tmp_path / "other").write_bytes(b"another file")
        (tmp_path / "other").rename(weights)
    else:
        with open(weights, "ab") as file:
            file.write(b"more")
    assert process.wait() == 2
    told = process.stderr.read()
    assert "an input" in told
    assert str(weights) in told
    assert "Traceback" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "dapt"]
