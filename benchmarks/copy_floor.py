"""The floor that a merge is held against: a Python process that imports torch and moves the bytes, no arithmetic.

    python benchmarks/copy_floor.py [--direct] [--threads N] INPUT... OUTPUT

Every byte of every input file is read, and the bytes of the first are written to OUTPUT, which is made before; reading
and writing go on in N threads. What is written goes to the page cache, or with `--direct` past it to the disk, by twice
as many threads, so that half of them can read while the others wait for the disk.
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import threading
from pathlib import Path

import torch

PIECE_BYTES = 1 << 20  # still in the processor's cache when it is written
DIRECT_PIECE_BYTES = 8 << 20  # fewer requests to the disk
BLOCK_BYTES = 4096  # what offset, length and address of a direct write are multiples of


def copy_part(inputs: list[int], output: int, direct: int | None, begin: int, end: int) -> None:
    piece = PIECE_BYTES if direct is None else DIRECT_PIECE_BYTES
    buffer = memoryview(mmap.mmap(-1, piece))
    for place in range(begin, end, piece):
        wanted = buffer[: min(piece, end - place)]
        for number in reversed(range(len(inputs))):  # the first comes last: it is what the buffer then holds
            read_whole(inputs[number], wanted, place)
        whole = 0 if direct is None else len(wanted) // BLOCK_BYTES * BLOCK_BYTES
        if direct is not None:
            write_whole(direct, wanted[:whole], place)
        write_whole(output, wanted[whole:], place + whole)


def read_whole(file: int, content: memoryview, place: int) -> None:
    done = 0
    while done < len(content):
        count = os.preadv(file, [content[done:]], place + done)
        if not count:
            return  # another input may be a little shorter
        done += count


def write_whole(file: int, content: memoryview, place: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(file, content[done:], place + done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("inputs", nargs="+", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    inputs = [os.open(path, os.O_RDONLY) for path in arguments.inputs]
    size = os.fstat(inputs[0]).st_size
    output = os.open(arguments.output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    os.posix_fallocate(output, 0, size)
    direct = os.open(arguments.output, os.O_WRONLY | os.O_DIRECT) if arguments.direct else None
    piece = PIECE_BYTES if direct is None else DIRECT_PIECE_BYTES
    count = arguments.threads * (1 if direct is None else 2)
    share = -(-size // count // piece) * piece
    threads = [
        threading.Thread(target=copy_part, args=(inputs, output, direct, begin, min(begin + share, size)))
        for begin in range(0, size, share)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{size * (len(inputs) + 1)} bytes moved beside torch {torch.__version__}", file=sys.stderr)


if __name__ == "__main__":
    main()
