"""How fast a corpus is built and in how much memory; and near duplicates beside datasketch used plainly.

    python benchmarks/corpus_speed.py                                   1,000,000 documents
    python benchmarks/corpus_speed.py --documents 50000 --plain 5000    two minutes, to try it

Documents are made from the sentences of real texts (`--texts`, by default the demo's corpora): their lengths are drawn
log-normally around 120 words, two in a hundred are copies and five in a hundred near copies (three words changed) of
one before. The build runs every step: boilerplate, Unicode, whitespace, quality, language, exact and near copies,
tokens and packing; with `--suites` it is held against those too. A million documents need about 6 GB of disk. Memory
is told in two ways. "Held" is the highest sum of Pss_Anon over the build's processes: what they hold beside pages of
mapped files, which the system takes back when it needs them; pages that processes share count once. "RSS" is the
highest sum of resident sets: mapped files and shared pages too, as often as processes have them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "corpus_speed"
SAMPLE_SECONDS = 0.5
MEDIAN_WORDS, SPREAD = 120, 0.8
COPIES, NEAR_COPIES = 0.02, 0.05
SENTENCES_OF_A_LINE = 4


def sentences_of(files: Sequence[Path]) -> list[str]:
    """Return the distinct sentences of JSON lines with a field `text`."""
    found: dict[str, None] = {}
    for file in files:
        for line in file.open(encoding="utf-8"):
            for sentence in re.split(r"(?<=[.!?;:])\s+", json.loads(line)["text"]):
                if len(sentence.split()) > 3:
                    found[sentence.strip()] = None
    return list(found)


def make_documents(sentences: Sequence[str], count: int, seed: int = 0) -> Iterator[str]:
    """Yield documents; see the module."""
    generator = np.random.default_rng(seed)
    words_of = np.array([len(sentence.split()) for sentence in sentences])
    recent: list[str] = []
    for _ in range(count):
        kind = generator.random()
        if recent and kind < COPIES + NEAR_COPIES:
            text = recent[int(generator.integers(len(recent)))]
            if kind >= COPIES:
                words = text.split(" ")
                for place in generator.integers(0, len(words), 3):
                    words[place] = f"mot{generator.integers(10**6)}"
                text = " ".join(words)
        else:
            wanted = max(20, int(generator.lognormal(np.log(MEDIAN_WORDS), SPREAD)))
            chosen = generator.integers(0, len(sentences), max(2, int(wanted / words_of.mean())))
            parts = [sentences[place] for place in chosen.tolist()]
            lines = [" ".join(parts[i : i + SENTENCES_OF_A_LINE]) for i in range(0, len(parts), SENTENCES_OF_A_LINE)]
            text = "\n".join(lines)
            if len(recent) < 2000:
                recent.append(text)
            else:
                recent[int(generator.integers(len(recent)))] = text
        yield text


def write_documents(files: Sequence[Path], count: int, target: Path) -> int:
    """Write documents as JSON lines; return their bytes."""
    with target.open("w", encoding="utf-8") as out:
        for text in make_documents(sentences_of(files), count):
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return target.stat().st_size


def build(settings: dict[str, Any]) -> dict[str, Any]:
    """Build a corpus in a process of its own; return seconds by step, and the peak of its memory."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(settings, file)
        file.flush()
        child = subprocess.Popen(
            [sys.executable, __file__, "--build", file.name], stdout=subprocess.PIPE, text=True, env=_environment()
        )
        peaks: dict[str, float] = {}
        resident = 0
        step = ["start"]
        done = threading.Event()

        def sample() -> None:
            nonlocal resident
            while not done.wait(SAMPLE_SECONDS):
                held, with_files = held_bytes(child.pid)
                resident = max(resident, with_files)
                peaks[step[0]] = max(peaks.get(step[0], 0), held)

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        result: dict[str, Any] = {}
        assert child.stdout is not None
        for line in child.stdout:
            told = json.loads(line)
            if "step" in told:
                step[0] = told["step"]
            else:
                result = told
        done.set()
        if child.wait() or not result:
            raise SystemExit("the build failed; see above")
    return {**result, "peak_bytes_by_step": peaks, "peak_bytes": max(peaks.values()), "peak_rss_bytes": resident}


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def held_bytes(process: int) -> tuple[int, int]:
    """Return what a process and all that it started hold, in bytes: Pss_Anon and RSS, each added up."""
    held, resident, waiting = 0, 0, [process]
    while waiting:
        number = waiting.pop()
        try:
            status = Path(f"/proc/{number}/smaps_rollup").read_text()
            held += 1024 * int(status.split("Pss_Anon:")[1].split()[0])
            resident += 1024 * int(status.split("Rss:")[1].split()[0])
            waiting += [int(n) for n in Path(f"/proc/{number}/task/{number}/children").read_text().split()]
        except (OSError, IndexError):
            continue
    return held, resident


def build_here(settings: dict[str, Any]) -> None:
    """Build in this process, and print what step begins when."""
    from dapt_merge.corpus import CorpusConfig, build_corpus
    from dapt_merge.corpus.building import load_tokenizer

    config = CorpusConfig.model_validate(settings)
    tokenizer = load_tokenizer(config)
    begun = time.perf_counter()
    seconds: dict[str, float] = {}
    at = ["start", begun]

    def enter(step: str) -> None:
        now = time.perf_counter()
        seconds[str(at[0])] = seconds.get(str(at[0]), 0.0) + now - float(at[1])
        at[:] = [step, now]
        print(json.dumps({"step": step}), flush=True)

    corpus = build_corpus(
        config, tokenizer, on_progress=lambda step, done, total: enter(step) if step != at[0] else None
    )
    enter("end")
    sources = corpus.manifest["sources"]
    times = os.times()
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - begun,
                "seconds_by_step": seconds,
                "processor_seconds": times.user + times.system + times.children_user + times.children_system,
                "documents": sum(source["documents_read"] for source in sources),
                "left_out": {k: v for source in sources for k, v in source["left_out"].items()},
                "tokens": corpus.manifest["tokens"]["held"],
            }
        )
    )


def plain_datasketch(texts: Sequence[str], threshold: float, ngram: int, permutations: int) -> tuple[float, set[int]]:
    """Deduplicate as datasketch's documentation shows; return the seconds and the documents left out."""
    from datasketch import MinHash, MinHashLSH

    begun = time.perf_counter()
    index = MinHashLSH(threshold=threshold, num_perm=permutations)
    gone = set()
    for number, text in enumerate(texts):
        words = re.sub(r"\W+", " ", text.casefold()).split()
        sketch = MinHash(num_perm=permutations)
        for shingle in {" ".join(words[i : i + ngram]) for i in range(max(1, len(words) - ngram + 1))}:
            sketch.update(shingle.encode())
        if index.query(sketch):
            gone.add(number)
        else:
            index.insert(number, sketch)
    return time.perf_counter() - begun, gone


def ours(texts: Sequence[str], threshold: float, ngram: int, permutations: int) -> tuple[float, set[int]]:
    """Deduplicate with this package, on one core; return the seconds and the documents left out."""
    from dapt_merge.corpus.config import NearDuplicates
    from dapt_merge.corpus.duplicates import near_duplicates
    from dapt_merge.corpus.shingles import shingles, signature

    options = NearDuplicates(threshold=threshold, ngram=ngram, permutations=permutations)
    signature(shingles("compiled before the clock runs", ngram), permutations)
    begun = time.perf_counter()
    signatures = np.stack([signature(shingles(text, ngram), permutations) for text in texts])
    pairs = near_duplicates(signatures, np.arange(len(texts)), options, texts.__getitem__)
    return time.perf_counter() - begun, {pair.document for pair in pairs}


def compare(texts: Sequence[str]) -> dict[str, Any]:
    """Time both ways in turn on the same documents, and hold what they leave out against the true similarity."""
    arguments = (0.8, 5, 128)
    seconds_plain, gone_plain = plain_datasketch(texts, *arguments)
    seconds_ours, gone_ours = ours(texts, *arguments)
    true = true_copies(texts, gone_plain | gone_ours, arguments[0], arguments[1])
    rows = {}
    for name, seconds, gone in (("plain", seconds_plain, gone_plain), ("ours", seconds_ours, gone_ours)):
        rows[name] = {
            "documents_per_second": len(texts) / seconds,
            "left_out": len(gone),
            "precision": len(gone & true) / max(len(gone), 1),
            "recall": len(gone & true) / max(len(true), 1),
        }
    return {"documents": len(texts), **rows, "times": seconds_plain / seconds_ours}


def true_copies(texts: Sequence[str], suspects: set[int], threshold: float, ngram: int) -> set[int]:
    """Return which suspects have a document before them that is truly as similar as the threshold.

    Every document that shares a run of words with a suspect is compared with it.
    """
    from collections import Counter, defaultdict

    from dapt_merge.corpus.shingles import shingles

    runs = [set(shingles(text, ngram).tolist()) for text in texts]
    holders: dict[int, list[int]] = defaultdict(list)
    for number, found in enumerate(runs):
        for run in found:
            holders[run].append(number)
    true = set()
    for number in suspects:
        shared: Counter[int] = Counter()
        for run in runs[number]:
            shared.update(other for other in holders[run] if other < number)
        if any(n / (len(runs[number]) + len(runs[other]) - n) >= threshold for other, n in shared.items()):
            true.add(number)
    return true


def report(result: dict[str, Any]) -> str:
    """Return the result as a page of Markdown."""
    built, near = result["build"], result["near"]
    steps = "\n".join(
        f"| {step} | {seconds:.1f} | {built['documents'] / max(seconds, 1e-9):,.0f} | "
        f"{built['peak_bytes_by_step'].get(step, 0) / 1e6:,.0f} |"
        for step, seconds in built["seconds_by_step"].items()
    )
    rows = "\n".join(
        f"| {title} | {near[key]['documents_per_second']:,.0f} | {near[key]['left_out']:,} | "
        f"{100 * near[key]['precision']:.2f}% | {100 * near[key]['recall']:.2f}% |"
        for title, key in (("datasketch used plainly", "plain"), ("dapt-merge, one core", "ours"))
    )
    left = ", ".join(f"{count:,} {reason}" for reason, count in built["left_out"].items())
    return f"""# Building a corpus

Made by `benchmarks/corpus_speed.py` on {result["machine"]}.

{built["documents"]:,} documents, {result["bytes"] / 1e9:.2f} GB of JSON lines, {built["tokens"]:,} tokens kept: \
{built["seconds"]:.0f} s, **{built["documents"] / built["seconds"]:,.0f} documents/s**, \
{result["bytes"] / built["seconds"] / 1e6:.1f} MB/s, {built["processor_seconds"]:.0f} s of processor time; at most \
**{built["peak_bytes"] / 1e6:,.0f} MB** held by all processes (RSS, mapped files too: \
{built["peak_rss_bytes"] / 1e6:,.0f} MB) and {built["disk_bytes"] / 1e9:.2f} GB on the disk, beside the documents. \
Left out: {left}.

| Step | Seconds | Documents/s | Held at most, MB |
| --- | ---: | ---: | ---: |
{steps}

## Near duplicates beside datasketch used plainly

{near["documents"]:,} of these documents, threshold 0.8, word 5-grams, 128 permutations, on one core: \
**{near["times"]:.1f} times** as many documents/s.

| | Documents/s | Left out | truly copies | of the true copies found |
| --- | ---: | ---: | ---: | ---: |
{rows}

A true copy has a document before it whose word 5-grams have a Jaccard similarity of at least 0.8, computed and not
estimated, among all that either way left out.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--plain", type=int, default=20_000, help="documents for the comparison with datasketch")
    parser.add_argument("--texts", type=Path, nargs="+", default=sorted(Path("demo/corpora").glob("*.jsonl")))
    parser.add_argument("--tokenizer", default="demo/base")
    parser.add_argument("--suites", nargs="*", default=[], help="suites to decontaminate against")
    parser.add_argument(
        "--scratch", type=Path, help="where the documents and the corpus go (default: a temporary folder)"
    )
    parser.add_argument("--processes", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--build", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        build_here(json.loads(Path(options.build).read_text()))
        return
    if not options.texts:
        raise SystemExit("no texts: run `dapt-merge demo` first, or name JSON lines with --texts")
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        result = measure(options, Path(scratch))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (options.out / "results.md").write_text(report(result), encoding="utf-8")
    print(report(result))


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Make the documents, build them, and compare the near duplicates."""
    documents = scratch / "documents.jsonl"
    size = write_documents(options.texts, options.documents, documents)
    settings: dict[str, Any] = {
        "sources": [{"path": str(documents), "language": "fr"}],
        "tokenizer": options.tokenizer,
        "clean": {},
        "deduplicate": {},
        "sequence_length": 2048,
        "cache_folder": str(scratch / "cache"),
        "processes": options.processes,
    }
    if options.suites:
        settings["decontaminate"] = options.suites
    built = build(settings)
    built["disk_bytes"] = sum(file.stat().st_size for file in (scratch / "cache").rglob("*") if file.is_file())
    with documents.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for _, line in zip(range(options.plain), lines, strict=False)]
    return {"machine": machine(), "bytes": size, "build": built, "near": compare(texts)}


def machine() -> str:
    """Describe what this runs on."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{len(os.sched_getaffinity(0))} cores of {model}"


if __name__ == "__main__":
    main()
