"""How fast a merge from disk to disk is: against copying the same bytes, and against mergekit.

    python benchmarks/merge_speed.py                      everything, about an hour with mergekit; go on after a break
    python benchmarks/merge_speed.py --skip-mergekit      a few minutes
    python benchmarks/merge_speed.py --methods linear ties --sizes 1.1B --runs 3 --scaling-runs 0

What is timed is a whole process, from its start to its end, with the inputs in the page cache. The floor is a Python
process that imports torch, reads every input byte and writes every output byte with as many threads (`copy_floor.py`).
The direct floor does so past the page cache, with twice as many. Both are measured in the same run, in turn with the
rest. Memory is the highest RssAnon seen in /proc: what a process holds beside file pages. Models have random weights in
the shapes of real ones; both programs are given the same recipe file. Each measurement is kept at once, so that a
benchmark that was interrupted goes on; `--fresh` starts anew. A run beside which other processes took more than a sixth
of a core is made again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "merge_speed"
SAMPLE_SECONDS = 0.02
TIMEOUT_SECONDS = 3600
# What the kernel's own threads take while they write an output back lies below this, another program's work above.
MOST_OTHER_CORES = 1 / 6
ATTEMPTS = 6
BASE_RMS, DELTA_RMS = 0.02, 0.001

# hidden, intermediate, layers, key and value width, vocabulary, whether the head is the embedding, biases
SHAPES: dict[str, tuple[int, int, int, int, int, bool, bool]] = {
    "tiny": (64, 128, 2, 32, 512, True, False),  # to try the benchmark itself
    "135M": (576, 1536, 30, 192, 49152, True, False),  # SmolLM2-135M
    "0.5B": (896, 4864, 24, 128, 151936, True, True),  # Qwen2.5-0.5B
    "1.1B": (2048, 5632, 22, 256, 32000, False, False),  # TinyLlama-1.1B
    "3B": (3072, 8192, 28, 1024, 128256, True, False),  # Llama-3.2-3B
}


@dataclass(frozen=True)
class Case:
    """A row of the table: a method, how many task vectors, what it must hold to."""

    method: str
    task_vectors: int
    at_most_times_floor: float | None
    at_least_times_faster: float | None
    settings: tuple[tuple[str, float], ...] = ()


CASES = {
    case.method: case
    for case in (
        Case("linear", 1, 1.3, 6),
        Case("task_arithmetic", 1, 1.3, 6),
        Case("slerp", 1, 1.5, 8),
        Case("dare_linear", 1, 1.8, 8, (("density", 0.5),)),
        Case("ties", 2, 2.5, 20, (("density", 0.3),)),
        Case("dare_ties", 2, 2.5, 20, (("density", 0.5),)),
        Case("della", 2, 3.5, 15, (("density", 0.5), ("epsilon", 0.1))),
        Case("breadcrumbs", 2, 3.5, 15, (("density", 0.7), ("gamma", 0.01))),
    )
}
# Of these, a base and one descendant of the largest size fit the memory of the machine together.
CASES["ties, base + 1"] = Case("ties", 1, None, None, (("density", 0.3),))
TABLE_METHODS = tuple(case.method for case in CASES.values() if case.at_most_times_floor)
SCALING_METHODS = ("linear", "ties, base + 1")
FLOORS = ("floor", "direct floor")
PROGRAMS = (*FLOORS, "dapt-merge", "dapt-merge cuda", "mergekit")


@dataclass(frozen=True)
class Measurement:
    """One process: what it was, how long it ran, what it took, and how many cores others used meanwhile."""

    size: str
    what: str
    program: str
    run: int
    seconds: float
    cpu_seconds: float
    rss_anon_bytes: int
    other_cores: float


class Record:
    """The measurements so far, kept in a JSON file after each one."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        self.setting = {"machine": machine(), "versions": versions()}
        self.measurements: list[Measurement] = []
        if path.is_file() and not fresh:
            found = json.loads(path.read_text(encoding="utf-8"))
            if {key: found.get(key) for key in self.setting} == self.setting:
                self.measurements = [Measurement(**row) for row in found["measurements"]]
            else:
                print("the machine or a version has changed: starting anew", file=sys.stderr)

    def runs(self, size: str, what: str, program: str) -> list[Measurement]:
        return [m for m in self.measurements if (m.size, m.what, m.program) == (size, what, program)]

    def add(self, measurement: Measurement) -> None:
        self.measurements.append(measurement)
        content = {**self.setting, "measurements": [asdict(m) for m in self.measurements]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)


class Bench:
    """Inputs, recipes and processes of one benchmark, below a work folder."""

    def __init__(self, work: Path, record: Record, threads: int) -> None:
        self.work, self.record, self.threads = work, record, threads
        work.mkdir(parents=True, exist_ok=True)

    def measure(self, size: str, what: str, program: str, run: int) -> None:
        """Measure one process, unless that run is on record. `what` is a method, or the floor's number of inputs."""
        if len(self.record.runs(size, what, program)) > run:
            return
        command = self.command(size, what, program)
        files = self.inputs(size, 1 + (int(what[0]) - 1 if "floor" in program else CASES[what].task_vectors))
        for attempt in range(1, ATTEMPTS + 1):
            for file in files:
                read_whole(file)
            self.clean()
            os.sync()
            busy = busy_seconds()
            seconds, cpu_seconds, highest = watch(command, self.work)
            others = max(0.0, busy_seconds() - busy - cpu_seconds) / seconds
            self.clean()
            line = f"{size} {what} {program} #{run + 1}: {seconds:.2f} s, {highest / 1e6:.0f} MB, others {others:.2f}"
            print(line, file=sys.stderr, flush=True)
            if others <= MOST_OTHER_CORES:
                break
            print(f"disturbed, attempt {attempt} of {ATTEMPTS}", file=sys.stderr, flush=True)
            time.sleep(5)
        self.record.add(Measurement(size, what, program, run, seconds, cpu_seconds, highest, others))

    def command(self, size: str, what: str, program: str) -> list[str]:
        if "floor" in program:
            flags = ["--direct"] if program == "direct floor" else []
            inputs = [str(file) for file in self.inputs(size, int(what[0]))]
            script = [sys.executable, str(HERE / "copy_floor.py"), "--threads", str(self.threads)]
            return [*script, *flags, *inputs, str(self.work / "output")]
        recipe = str(self.recipe(size, CASES[what]))
        if program == "mergekit":
            return [str(beside("mergekit-yaml")), recipe, str(self.work / "output"), "--no-copy-tokenizer"]
        flags = ["--device", "cuda"] if program.endswith("cuda") else []
        out = ["--threads", str(self.threads), "-o", str(self.work / "output")]
        return [str(beside("dapt-merge")), "merge", recipe, *flags, *out]

    def clean(self) -> None:
        output = self.work / "output"
        if output.is_dir():
            shutil.rmtree(output)
        else:
            output.unlink(missing_ok=True)

    def inputs(self, size: str, count: int) -> list[Path]:
        """Return the weight files of the base and its descendants, made where they are missing."""
        return [make_model(self.work / size, size, number) / "model.safetensors" for number in range(count)]

    def recipe(self, size: str, case: Case) -> Path:
        """Write the method's recipe in mergekit's dialect."""
        folders = [str(file.parent) for file in self.inputs(size, 1 + case.task_vectors)]
        per_model = dict(case.settings)
        if case.method in ("linear", "slerp"):
            models = [{"model": folder, "parameters": {"weight": 0.5}} for folder in folders]
        else:
            parameters = {"weight": 0.5, **per_model}
            models = [{"model": folder, "parameters": parameters} for folder in folders[1:]]
        content: dict[str, Any] = {"merge_method": case.method, "models": models, "dtype": "bfloat16"}
        if case.method != "linear":
            content["base_model"] = folders[0]
        if case.method == "slerp":
            content["models"] = [{"model": folder} for folder in folders]
            content["parameters"] = {"t": 0.5}
        path = self.work / f"{size}-{case.method}-{case.task_vectors}.yaml"
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")  # JSON is YAML
        return path


def watch(command: list[str], work: Path) -> tuple[float, float, int]:
    """Run a process to its end; return wall seconds, processor seconds and the highest RssAnon in bytes."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("OMP_NUM_THREADS", None)  # every program as it is when a user starts it
    with tempfile.TemporaryFile(dir=work) as messages:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=messages, stderr=subprocess.STDOUT, env=environment)
        highest, status = 0, None
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            highest = max(highest, rss_anon_bytes(process.pid))
            if time.perf_counter() - started > TIMEOUT_SECONDS:
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            messages.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{messages.read().decode(errors='replace')[-4000:]}")
    return seconds, usage.ru_utime + usage.ru_stime, highest


def busy_seconds() -> float:
    """Return the processor seconds that all processes of the machine have taken, interrupts left out."""
    user, nice, system = (int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def rss_anon_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def read_whole(path: Path) -> None:
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def make_model(folder: Path, size: str, number: int) -> Path:
    """Write a model with random bfloat16 weights: the base, or the base plus a task vector."""
    import torch

    from dapt_merge.atomic import atomic_folder
    from dapt_merge.checkpoints import CheckpointWriter, TensorInfo, open_checkpoint
    from dapt_merge.tensors.dtypes import Dtype

    path = folder / ("base" if number == 0 else f"dapt-{number}")
    if path.is_dir():
        return path
    print(f"making {path}", file=sys.stderr)
    base = None if number == 0 else open_checkpoint(make_model(folder, size, 0))
    generator = torch.Generator().manual_seed(number)
    shapes = tensor_shapes(size)
    infos = [TensorInfo(name, Dtype.BFLOAT16, shape, 2 * _elements(shape)) for name, shape in shapes.items()]
    with atomic_folder(path) as partial:
        with CheckpointWriter(partial, infos, shard_bytes=10**12) as writer:
            for info in infos:
                start = None if base is None else base.read(info.name).reshape(-1)
                stream = writer.stream(info.name)
                with stream:
                    for begin in range(0, info.elements, 1 << 18):
                        end = min(begin + (1 << 18), info.elements)
                        values = torch.randn(end - begin, generator=generator)
                        values *= BASE_RMS if start is None else DELTA_RMS
                        stream.place(begin, end).copy_(values if start is None else values + start[begin:end])
                stream.complete()
        (partial / "config.json").write_text(json.dumps(configuration(size)), encoding="utf-8")
    return path


def tensor_shapes(size: str) -> dict[str, tuple[int, ...]]:
    hidden, inner, layers, narrow, vocabulary, tied, biased = SHAPES[size]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        for part, width in (("q", hidden), ("k", narrow), ("v", narrow)):
            shapes[f"{start}self_attn.{part}_proj.weight"] = (width, hidden)
            if biased:
                shapes[f"{start}self_attn.{part}_proj.bias"] = (width,)
        shapes |= {
            f"{start}self_attn.o_proj.weight": (hidden, hidden),
            f"{start}mlp.gate_proj.weight": (inner, hidden),
            f"{start}mlp.up_proj.weight": (inner, hidden),
            f"{start}mlp.down_proj.weight": (hidden, inner),
            f"{start}input_layernorm.weight": (hidden,),
            f"{start}post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def configuration(size: str) -> dict[str, Any]:
    hidden, inner, layers, narrow, vocabulary, tied, biased = SHAPES[size]
    head = 64 if narrow % 64 == 0 else 32
    return {
        "architectures": ["Qwen2ForCausalLM" if biased else "LlamaForCausalLM"],
        "model_type": "qwen2" if biased else "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // head,
        "num_key_value_heads": narrow // head,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def parameters(size: str) -> int:
    return sum(_elements(shape) for shape in tensor_shapes(size).values())


def beside(name: str) -> Path:
    """Return a command of this Python's environment."""
    return Path(sys.executable).parent / name


def machine() -> dict[str, Any]:
    """Say where the measurements were made; nothing that names the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    lines = Path("/proc/meminfo").read_text().splitlines()
    memory = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    found: dict[str, Any] = {"processor": processor or platform.machine(), "cpus": len(os.sched_getaffinity(0))}
    found |= {"memory_gib": round(memory / 2**30), "kernel": platform.release().split("-")[0]}
    gpu = gpu_name()
    return found | ({"gpu": gpu} if gpu else {})


def gpu_name() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.splitlines()[0] if found else None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("dapt-merge", "torch", "numba", "safetensors", "mergekit"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    arguments = parse_arguments()
    record = Record(arguments.out / "results.json", arguments.fresh)
    threads = arguments.threads or len(os.sched_getaffinity(0))
    bench = Bench(arguments.work, record, threads)
    try:
        if not arguments.report_only:
            measure_all(bench, arguments)
    finally:
        write_report(record, arguments.out, threads)
        if arguments.clean:
            shutil.rmtree(arguments.work, ignore_errors=True)


def measure_all(bench: Bench, arguments: argparse.Namespace) -> None:
    ours = ["dapt-merge", *(["dapt-merge cuda"] if arguments.cuda else [])]
    if arguments.runs or arguments.scaling_runs:
        compile_loops(bench, [*arguments.methods, *SCALING_METHODS])
    for run in range(max(arguments.runs, arguments.peer_runs)):
        if run < arguments.runs:
            turns = floors_of(arguments.methods)
            turns += [(method, program) for method in arguments.methods for program in ours]
            random.Random(run).shuffle(turns)  # nothing always follows the same
            for what, program in turns:
                bench.measure(arguments.size, what, program, run)
        if run < arguments.peer_runs and not arguments.skip_mergekit:
            for method in arguments.methods:
                bench.measure(arguments.size, method, "mergekit", run)
    for run in range(arguments.scaling_runs):
        for size in arguments.sizes:
            for what, program in floors_of(SCALING_METHODS):
                bench.measure(size, what, program, run)
            for method in SCALING_METHODS:
                for program in ours:
                    bench.measure(size, method, program, run)
                if not arguments.skip_mergekit and run < arguments.scaling_peer_runs:
                    bench.measure(size, method, "mergekit", run)


def compile_loops(bench: Bench, methods: list[str]) -> None:
    """Merge something tiny by each method: the first merge after an installation compiles, which is not measured."""
    for method in methods:
        bench.inputs("tiny", 1 + CASES[method].task_vectors)
        bench.clean()  # what an interrupted benchmark left
        watch(bench.command("tiny", method, "dapt-merge"), bench.work)
        bench.clean()


def floors_of(methods: Iterable[str]) -> list[tuple[str, str]]:
    """Return (what, program) of the floors that the methods are held against."""
    counts = sorted({CASES[method].task_vectors + 1 for method in methods})
    return [(f"{count} inputs", floor) for count in counts for floor in FLOORS]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(TABLE_METHODS), choices=list(TABLE_METHODS))
    parser.add_argument("--size", default="1.1B", choices=list(SHAPES), help="of the table")
    parser.add_argument("--runs", type=int, default=5, help="of the floor and of ours")
    parser.add_argument("--peer-runs", type=int, default=5, help="of mergekit (ties takes minutes each)")
    parser.add_argument("--skip-mergekit", action="store_true")
    parser.add_argument("--sizes", nargs="*", default=["135M", "0.5B", "1.1B", "3B"], choices=list(SHAPES))
    parser.add_argument("--scaling-runs", type=int, default=3, help="of each size; 0 leaves the chart out")
    parser.add_argument("--scaling-peer-runs", type=int, default=1)
    parser.add_argument("--cuda", action="store_true", help="measure --device cuda as well")
    parser.add_argument("--threads", type=int, help="of the floor and of ours (default: the CPUs there are)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "merge-speed", help="for the models")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results.json, RESULTS.md and the chart go")
    parser.add_argument("--fresh", action="store_true", help="forget the measurements so far")
    parser.add_argument("--clean", action="store_true", help="remove the work folder at the end")
    parser.add_argument("--report-only", action="store_true", help="measure nothing, write the report again")
    arguments = parser.parse_args()
    if arguments.cuda and gpu_name() is None:
        parser.error("there is no CUDA device here")
    return arguments


def median_seconds(record: Record, size: str, what: str, program: str) -> float | None:
    found = [m.seconds for m in record.runs(size, what, program)]
    return statistics.median(found) if found else None


def highest_memory(record: Record, size: str, what: str, program: str) -> int | None:
    return max((m.rss_anon_bytes for m in record.runs(size, what, program)), default=None)


def write_report(record: Record, folder: Path, threads: int) -> None:
    if not record.measurements:
        return
    sizes = [size for size in SHAPES if any(m.size == size for m in record.measurements)]
    lines = ["# Merging from disk to disk", "", "Written by `python benchmarks/merge_speed.py`.", ""]
    lines += [
        ", ".join(f"{key} {value}" for key, value in record.setting["machine"].items()) + f", threads {threads}  "
    ]
    lines += [", ".join(f"{key} {value}" for key, value in record.setting["versions"].items()), ""]
    lines += [
        "Whole processes, start-up included, inputs in the page cache, medians of the runs in brackets. The floor",
        "imports torch, reads every input byte and writes every output byte, into the page cache; the direct floor",
        "writes past it, with twice as many threads. No process waits until the disk has everything. Memory is the",
        "highest RssAnon of any run.",
        "",
    ]
    for size in sizes:
        lines += table(record, size)
    chart = scaling_chart(record, folder, sizes)
    if chart is not None:
        lines += ["## Cost over size", "", f"![seconds over parameters]({chart.name})", ""]
    (folder / "RESULTS.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"written: {folder / 'RESULTS.md'}", file=sys.stderr)


def table(record: Record, size: str) -> list[str]:
    programs = [p for p in PROGRAMS[2:4] if any(m.size == size and m.program == p for m in record.measurements)]
    lines = [f"## {size}: {parameters(size) / 1e6:,.0f}M parameters in bfloat16", ""]
    lines += [
        "| method | inputs | floor (s) | direct floor (s) | ours (s) | × floor | asked | × direct "
        "| mergekit (s) | × faster | asked | ours (MB) | mergekit (MB) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, case in CASES.items():
        for program in programs:
            if record.runs(size, method, program):
                lines.append(row(record, size, method, case, program))
    return [*lines, ""]


def row(record: Record, size: str, what: str, case: Case, program: str) -> str:
    inputs = f"{case.task_vectors + 1} inputs"
    ours = median_seconds(record, size, what, program)
    floor = median_seconds(record, size, inputs, "floor")
    direct = median_seconds(record, size, inputs, "direct floor")
    peer = median_seconds(record, size, what, "mergekit")

    def seconds(label: str, name: str) -> str:
        found = median_seconds(record, size, label, name)
        return "–" if found is None else f"{found:.2f} [{len(record.runs(size, label, name))}]"

    def megabytes(name: str) -> str:
        found = highest_memory(record, size, what, name)
        return "–" if found is None else f"{found / 1e6:,.0f}"

    def ratio(above: float | None, below: float | None) -> str:
        return "–" if above is None or below is None else f"{above / below:.2f}"

    asked = size == "1.1B" and case.at_most_times_floor is not None
    cells = [
        case.method + program.removeprefix("dapt-merge"),
        f"base + {case.task_vectors}",
        seconds(inputs, "floor"),
        seconds(inputs, "direct floor"),
        seconds(what, program),
        ratio(ours, floor),
        f"≤ {case.at_most_times_floor}" if asked else "",
        ratio(ours, direct),
        seconds(what, "mergekit"),
        ratio(peer, ours),
        f"≥ {case.at_least_times_faster}" if asked else "",
        megabytes(program),
        megabytes("mergekit"),
    ]
    return "| " + " | ".join(cells) + " |"


def scaling_chart(record: Record, folder: Path, sizes: list[str]) -> Path | None:
    """Draw seconds over parameters, for all that was measured at two sizes or more."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines: dict[str, tuple[str, str, str]] = {}
    for method, colour in zip(SCALING_METHODS, ("tab:blue", "tab:orange"), strict=True):
        lines[f"dapt-merge, {method}"] = (method, "dapt-merge", colour)
        lines[f"mergekit, {method}"] = (method, "mergekit", colour)
    for count, colour in ((2, "0.3"), (3, "0.6")):
        lines[f"floor, {count} inputs"] = (f"{count} inputs", "floor", colour)
        lines[f"direct floor, {count} inputs"] = (f"{count} inputs", "direct floor", colour)
    styles = {"dapt-merge": "o-", "mergekit": "s--", "floor": "^:", "direct floor": "v:"}
    known = {}
    for label, (what, program, colour) in lines.items():
        points = [(parameters(size) / 1e9, median_seconds(record, size, what, program)) for size in sizes]
        measured = [(x, y) for x, y in points if y is not None and x > 0.01]
        if len(measured) > 1:
            known[label] = measured, styles[program], colour, program
    if not known:
        return None
    figure, (everything, near) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, title in ((everything, "beside mergekit"), (near, "the same, without mergekit")):
        for label, (measured, style, colour, program) in known.items():
            if axes is everything or program != "mergekit":
                axes.plot(*zip(*measured, strict=True), style, label=label, color=colour)
        axes.set(xlabel="parameters (billions)", ylabel="whole process (s)", title=title)
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle("A merge costs what its bytes cost")
    path = folder / "scaling.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    main()
