"""The floor that a merge is held against: a Python process that imports torch and moves the bytes, no arithmetic.

    python benchmarks/copy_floor.py [--flush] [--threads N] INPUT... OUTPUT

Every byte of every input file is read, and the bytes of the first are written to OUTPUT, which is made before; reading
and writing go on in N threads. `--flush` also waits for the disk, as a merge does with its own `--flush`.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path

import torch

PIECE_BYTES = 1 << 20


def copy_part(inputs: list[int], output: int, begin: int, end: int) -> None:
    buffer = memoryview(bytearray(PIECE_BYTES))
    for place in range(begin, end, PIECE_BYTES):
        for number in reversed(range(len(inputs))):  # the first comes last: it is what the buffer then holds
            count = os.preadv(inputs[number], [buffer], place)
        os.pwrite(output, buffer[: min(count, end - place)], place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--flush", action="store_true")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("inputs", nargs="+", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    inputs = [os.open(path, os.O_RDONLY) for path in arguments.inputs]
    size = os.fstat(inputs[0]).st_size
    output = os.open(arguments.output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    os.posix_fallocate(output, 0, size)
    share = -(-size // arguments.threads // PIECE_BYTES) * PIECE_BYTES
    threads = [
        threading.Thread(target=copy_part, args=(inputs, output, begin, min(begin + share, size)))
        for begin in range(0, size, share)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if arguments.flush:
        os.fsync(output)
    print(f"{size * (len(inputs) + 1)} bytes moved beside torch {torch.__version__}", file=sys.stderr)


if __name__ == "__main__":
    main()
