"""Past the page cache or through it, at once or when the disk is behind: the file is the same."""

import errno
import threading

import pytest
import torch

from dapt_merge.checkpoints import CheckpointWriter, TensorInfo, page_cache, staging
from dapt_merge.tensors.dtypes import Dtype

BYTES = 300_000


@pytest.fixture
def impatient(monkeypatch):
    """Write as if the disk had just been waited for, all the time."""
    monkeypatch.setattr(staging.Staging, "_caches", lambda self: self._cached_bytes > 0)


def written(folder, *, cached_bytes, monkeypatch, pieces=4096):
    """Write three tensors whose borders lie within blocks; return the file's bytes and how many came cached."""
    ways = []
    write = staging.OutputFile.write

    def watched(self, content, offset, *, cached=False):
        ways.append((cached, len(content)))
        write(self, content, offset, cached=cached)

    monkeypatch.setattr(staging.OutputFile, "write", watched)
    monkeypatch.setattr(staging, "_CACHED_PIECE_BYTES", pieces)
    monkeypatch.setattr("dapt_merge.checkpoints.writer.page_cache_room", lambda: cached_bytes)
    tensors = {f"t.{index}": torch.arange(BYTES // 4 + index, dtype=torch.float32) for index in range(3)}
    specs = [TensorInfo(name, Dtype.FLOAT32, tuple(t.shape), 4 * len(t)) for name, t in tensors.items()]
    folder.mkdir()
    with CheckpointWriter(folder, specs, flush=False) as writer:
        for name, tensor in tensors.items():
            with writer.stream(name) as stream:
                for begin in range(0, len(tensor), 999):
                    end = min(begin + 999, len(tensor))
                    stream.place(begin, end).tensor.copy_(tensor[begin:end])
            stream.complete()
    return (folder / "model.safetensors").read_bytes(), sum(count for cached, count in ways if cached)


@pytest.mark.parametrize("pieces", [1, 4096, 50_000, 2**21])
def test_both_ways_write_the_same_file(tmp_path, monkeypatch, impatient, pieces):
    direct, none = written(tmp_path / "direct", cached_bytes=0, monkeypatch=monkeypatch)
    cached, most = written(tmp_path / "cached", cached_bytes=2**40, monkeypatch=monkeypatch, pieces=pieces)
    assert direct == cached
    assert none == 0
    assert most > 2 * BYTES


def test_room_that_ends_on_the_way_sends_the_rest_to_the_disk(tmp_path, monkeypatch, impatient):
    direct, _ = written(tmp_path / "direct", cached_bytes=0, monkeypatch=monkeypatch)
    mixed, some = written(tmp_path / "mixed", cached_bytes=100_000, monkeypatch=monkeypatch)
    assert direct == mixed
    assert 0 < some <= 100_000


def test_dear_memory_sends_the_rest_to_the_disk(tmp_path, monkeypatch, impatient):
    monkeypatch.setattr(staging, "_TELLING_BYTES", 0)
    monkeypatch.setattr(staging, "_DEAREST_SECONDS_PER_BYTE", 0.0)
    direct, _ = written(tmp_path / "direct", cached_bytes=0, monkeypatch=monkeypatch)
    mixed, some = written(tmp_path / "mixed", cached_bytes=2**40, monkeypatch=monkeypatch)
    assert direct == mixed
    assert 0 < some < 50_000, "one piece told"


def test_a_disk_that_keeps_up_gets_everything_directly(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_PATIENCE_SECONDS", 60.0)
    _, none = written(tmp_path / "out", cached_bytes=2**40, monkeypatch=monkeypatch)
    assert none == 0


def test_a_thread_that_waited_for_the_disk_writes_its_next_pieces_itself():
    held = threading.Event()
    stage = staging.Staging(1, cached_bytes=2**30)
    buffers = [stage.take(), stage.take()]
    assert stage.piece_bytes == stage.buffer_bytes
    carried = [stage.carry(lambda cached: (held.wait(), stage.give(buffers[0])), 4096)]
    threading.Timer(2 * staging._PATIENCE_SECONDS, held.set).start()
    stage.take()
    ways = []
    assert stage.piece_bytes < stage.buffer_bytes
    assert stage.carry(ways.append, staging._BURST_BYTES) is None
    assert ways == [True]
    assert stage.piece_bytes == stage.buffer_bytes, "the disk has its turn again"
    carried += [stage.carry(ways.append, 4096)]
    for write in carried:
        write.result()
    assert ways == [True, False]
    stage.close()


def test_a_full_disk_met_in_the_page_cache_reaches_the_caller(tmp_path, monkeypatch, impatient):
    def full(descriptor, content, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staging, "_write_at", full)
    with pytest.raises(OSError, match="No space") as caught:
        written(tmp_path / "out", cached_bytes=2**40, monkeypatch=monkeypatch)
    assert caught.value.errno == errno.ENOSPC


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a machine with 1000 kB, of which the kernel leaves 10% unwritten."""
    rows = {"MemFree": 500, "MemAvailable": 900, "Active(file)": 200, "Inactive(file)": 300, "Dirty": 0, "Writeback": 0}
    limits = {"dirty_background_bytes": 0, "dirty_background_ratio": 10}

    def write(**changed):
        known = {name: changed.get(name, value) for name, value in rows.items()}
        (tmp_path / "meminfo").write_text("".join(f"{name}: {value} kB\n" for name, value in known.items()))
        for name, value in limits.items():
            (tmp_path / name).write_text(f"{changed.get(name, value)}\n")
        (tmp_path / "memory.max").write_text(f"{changed.get('group', 'max')}\n")

    monkeypatch.setattr(page_cache, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(page_cache, "_LIMITS", tmp_path)
    monkeypatch.setattr(page_cache, "_GROUP", tmp_path / "memory.max")
    return write


def test_the_room_in_the_page_cache_is_what_the_kernel_leaves_alone(machine):
    assert page_cache.page_cache_room() == 0, "nothing can be read"
    machine()
    assert page_cache.page_cache_room() == 100 * 1024
    machine(Dirty=30, Writeback=20)
    assert page_cache.page_cache_room() == 50 * 1024
    machine(Dirty=200)
    assert page_cache.page_cache_room() == 0
    machine(dirty_background_bytes=2048)
    assert page_cache.page_cache_room() == 2048
    machine(MemAvailable=80)
    assert page_cache.page_cache_room() == 20 * 1024
    machine(group=80 * 1024)
    assert page_cache.page_cache_room() == 10 * 1024
