"""How fast DAPT is: ours, a plain Trainer over padded documents, a plain Trainer over concatenated blocks.

    python benchmarks/pretrain_speed.py --demo DEMO              about seven minutes on two quiet cores
    python benchmarks/pretrain_speed.py --model M --corpus C.jsonl --rounds 1 --seconds 20

DEMO is the folder that `dapt-merge demo` wrote; its pretrain.yaml names the base model, and --model overrides it. All
three train the same model on the same documents with fused AdamW, with bfloat16 compute over float32 weights (or all in
float32: --precision fp32), torch's attention, gradients clipped at 1 and about as many tokens in one optimizer step.
They take turns, each in a process of its own until its time is up, for some rounds, with the documents in another order
in each. Tokens that count are the documents' own: no padding, no separators, nothing that was cut off. The two plain
scripts are what is commonly written: `bf16=True`, a tokenizer, a collator.

The padded one pads to the longest document of a micro-batch, not to the maximum, and takes as many documents as hold a
step's tokens: kinder than most. The first step of each is not timed. Speeds are over the rounds together, ratios are
given round by round too. Memory is the highest resident set of the process (on a GPU: the most that torch allocated).
Results: benchmarks/pretrain_speed/results.{json,md}.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "pretrain_speed"
ARMS = {
    "ours": "dapt-merge pretrain, documents packed and kept apart",
    "packed": "plain Trainer, concatenated blocks",
    "padded": "plain Trainer, padded documents",
}
PRECISIONS = {"bf16": "bfloat16 compute over float32 weights", "fp32": "float32"}
TARGETS = {"packed": 1.0, "padded": 2.0}
RATE = 3e-4


class TimeIsUp(Exception):
    """Ends an arm from within its last step's log."""


class Clock:
    """Counts tokens that count, from the end of the first step until the time is up."""

    def __init__(self, seconds: float, counts: list[int]) -> None:
        self.seconds, self.counts = seconds, counts
        self.steps, self.began, self.elapsed = 0, 0.0, 0.0
        self.processor_began = self.processor = 0.0

    def step(self) -> bool:
        """Note the end of a step; say whether the time is up."""
        self.steps += 1
        if self.steps == 1:
            self.began, self.processor_began = time.perf_counter(), time.process_time()
            return False
        self.elapsed = time.perf_counter() - self.began
        self.processor = time.process_time() - self.processor_began
        return self.elapsed >= self.seconds or self.steps == len(self.counts)

    def result(self) -> dict[str, Any]:
        tokens = sum(self.counts[1 : self.steps])
        times = {"seconds": self.elapsed, "processor_seconds": self.processor}
        return {"tokens": tokens, **times, "steps": self.steps - 1}


def ours(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from dapt_merge.corpus import build_corpus
    from dapt_merge.pretraining import load_pretrain_config, pretrain

    steps = options.steps
    config = load_pretrain_config(
        {
            "base": str(options.model),
            "corpus": [str(options.corpus)],
            "output": str(scratch / "run"),
            "cache_folder": str(scratch / "cache"),
            "sequence_length": options.length,
            "batch_tokens": options.batch_tokens,
            "micro_batch_tokens": options.micro_batch_tokens,
            "tokens": steps * options.batch_tokens,
            "learning_rate": RATE,
            "checkpoints": 1,
            "precision": "bf16-master" if options.precision == "bf16" else "fp32",
            "save_every_minutes": None,
            "seed": options.seed,
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = build_corpus(config.corpus_config(), tokenizer, rows_multiple=config.batch_sequences).train
    counts = [
        int((rows[slice(at, at + config.batch_sequences)]["input_ids"] != tokenizer.eos_token_id).sum())
        for at in range(0, len(rows), config.batch_sequences)
    ]
    clock = Clock(options.seconds, counts)

    def on_log(line: dict[str, Any]) -> None:
        if clock.step():
            raise TimeIsUp

    # The last step writes a checkpoint before it is logged: the clock must stop before it.
    clock.counts = counts[:-1]
    with contextlib.suppress(TimeIsUp):
        pretrain(config, on_log=on_log)
    return clock.result()


def plain(options: argparse.Namespace, scratch: Path, *, packed: bool) -> dict[str, Any]:
    """A script as it is commonly written, over blocks or over padded documents."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    end = tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [json.loads(line)["text"] for line in options.corpus.read_text(encoding="utf-8").splitlines()]
    tokens = [[*ids, end] for ids in tokenizer(texts)["input_ids"]]
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(options.seed)).tolist()
    tokens = [tokens[index] for index in order]
    if packed:
        stream = [token for ids in tokens for token in ids]
        whole = range(0, len(stream) - options.length + 1, options.length)
        rows = [stream[at : at + options.length] for at in whole]
        micro = options.micro_batch_tokens // options.length
    else:
        rows = [ids[: options.length] for ids in tokens]
        # As many documents as hold a micro-batch's tokens.
        micro = max(1, round(options.micro_batch_tokens * len(rows) / sum(map(len, rows))))
    accumulation = options.batch_tokens // options.micro_batch_tokens
    batch = micro * accumulation
    counts = [
        sum(token != end for ids in rows[at : at + batch] for token in ids) for at in range(0, len(rows) - batch, batch)
    ][: options.steps]
    clock = Clock(options.seconds, counts)

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = clock.step()
            return control

    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=len(counts),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        bf16=options.precision == "bf16",
        optim="adamw_torch_fused",
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        train_sampling_strategy="sequential",  # the order was drawn above, so that the tokens can be counted
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        log_level="error",
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[Watch()],
    )
    trainer.train()
    width = [max(map(len, rows[at : at + micro])) for at in range(0, batch * clock.steps, micro)]
    return {**clock.result(), "padding_share": 1 - sum(map(len, rows[: batch * clock.steps])) / (sum(width) * micro)}


def run_here(options: argparse.Namespace) -> None:
    """Run one arm in this process and print its figures."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        result = (
            ours(options, scratch) if options.arm == "ours" else plain(options, scratch, packed=options.arm == "packed")
        )
    result["tokens_per_second"] = result["tokens"] / max(result["seconds"], 1e-9)
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    result |= utilisation(options, result["tokens_per_second"])
    print(f"RESULT {json.dumps(result)}")


def utilisation(options: argparse.Namespace, tokens_per_second: float) -> dict[str, Any]:
    """Return the share of a GPU's peak that tokens that count use; nothing where no peak is known."""
    import torch
    from transformers import AutoModelForCausalLM

    from dapt_merge.pretraining.throughput import flops_per_token, peak_flops

    peak = peak_flops(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if peak is None:
        return {}
    model = AutoModelForCausalLM.from_pretrained(options.model)
    return {"mfu": tokens_per_second * flops_per_token(model, options.length) / peak}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every arm in a process of its own, for some rounds, each starting with another arm; return the rounds."""
    rounds = []
    names = list(ARMS)
    for number in range(options.rounds):
        found = {}
        for arm in names[number % len(names) :] + names[: number % len(names)]:
            print(f"round {number + 1} of {options.rounds}, {arm}: {ARMS[arm]} …", flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm, "--seed", str(number)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
            found[arm] = json.loads(line.removeprefix("RESULT "))
            print(f"  {found[arm]['tokens_per_second']:,.1f} tokens that count a second", flush=True)
        rounds.append(found)
    return rounds


def together(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each arm over all rounds: sums, the highest peak, and what ours is of it in every round."""
    arms = {}
    for arm in ARMS:
        runs = [found[arm] for found in rounds]
        total = {key: sum(run[key] for run in runs) for key in ("tokens", "seconds", "processor_seconds", "steps")}
        total["tokens_per_second"] = total["tokens"] / total["seconds"]
        total["tokens_per_processor_second"] = total["tokens"] / total["processor_seconds"]
        total["peak_bytes"] = max(run["peak_bytes"] for run in runs)
        for key in ("padding_share", "mfu"):
            if key in runs[0]:
                total[key] = sum(run[key] for run in runs) / len(runs)
        total["ours_is"] = [found["ours"]["tokens_per_second"] / found[arm]["tokens_per_second"] for found in rounds]
        arms[arm] = total
    return arms


def environment() -> dict[str, Any]:
    """Return what the figures were measured with."""
    import torch

    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
    }


def page(result: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    arms, settings = result["arms"], result["settings"]
    has_mfu = any("mfu" in arm for arm in arms.values())
    lines = [
        "# Pre-training speed",
        "",
        f"{result['model']}, {settings['corpus']}, {settings['batch_tokens']} tokens a step in sequences of",
        f"{settings['length']}, {PRECISIONS[settings['precision']]} in all three; rounds: {settings['rounds']}.",
        "Tokens that count are the documents' own: no padding, no separators.",
        "`python benchmarks/pretrain_speed.py --help` says how it is measured.",
        "",
        "| | tokens that count/s | ours is | round by round | target | padding | steps | peak memory |"
        + (" MFU |" if has_mfu else ""),
        "|---|---|---|---|---|---|---|---|" + ("---|" if has_mfu else ""),
    ]
    for name, arm in arms.items():
        times = arms["ours"]["tokens_per_second"] / arm["tokens_per_second"]
        each = ", ".join(f"{ratio:.2f}" for ratio in arm["ours_is"])
        target = f"≥ {TARGETS[name]:g} ×" if name in TARGETS else ""
        row = f"| {ARMS[name]} | {arm['tokens_per_second']:,.1f} | {times:.2f} × | {each} | {target} "
        row += f"| {100 * arm.get('padding_share', 0):.0f}% | {arm['steps']} | {arm['peak_bytes'] / 1e9:.2f} GB |"
        lines.append(row + (f" {100 * arm['mfu']:.1f}% |" if has_mfu else ""))
    machine = ", ".join(f"{key} {value}" for key, value in result["environment"].items() if value is not None)
    processor = ", ".join(f"{name} {arm['tokens_per_processor_second']:.1f}" for name, arm in arms.items())
    lines += ["", f"Tokens that count a processor second: {processor}.", f"Measured with: {machine}.", ""]
    return "\n".join(lines)


def base_of(demo: Path) -> Path:
    """Return the base model that the demo's own run names."""
    import yaml

    return Path(yaml.safe_load((demo / "pretrain.yaml").read_text(encoding="utf-8"))["base"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="the demo's folder")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--corpus", type=Path, help="a .jsonl file with a field 'text'")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="of training, for each arm in each round")
    parser.add_argument("--steps", type=int, default=200, help="at most")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.demo is not None:
        options.model = options.model or base_of(options.demo)
        options.corpus = options.corpus or options.demo / "corpora" / "domain-train.jsonl"
    if options.model is None or options.corpus is None:
        parser.error("give --demo, or --model and --corpus")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.arm:
        run_here(options)
        return
    kept = ("rounds", "seconds", "length", "batch_tokens", "micro_batch_tokens", "precision")
    settings = {key: getattr(options, key) for key in kept}
    before = environment()
    rounds = measure(options)
    result = {
        "environment": before,
        "model": options.model.resolve().name if options.demo is None else "SmolLM2-135M",
        "settings": {**settings, "corpus": options.corpus.name},
        "arms": together(rounds),
        "rounds": rounds,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.out / "results.md").write_text(page(result), encoding="utf-8")
    print(page(result))


if __name__ == "__main__":
    main()
