"""A tiny model, its tokenizer, and two tasks over local files: everything that scoring needs, offline."""

import json
from pathlib import Path

SENTENCES = [
    "The heart pumps blood through the body.",
    "La fièvre baisse après deux jours de repos.",
    "A short text.",
    "Insulin lowers the level of sugar in the blood, and glucagon raises it again when it is too low.",
    "Le médecin écoute le cœur.",
    "Bones hold the body up.",
    "Water boils at one hundred degrees.",
    "Les os portent le corps, et les muscles le meuvent.",
    "The lungs take up oxygen and give off carbon dioxide with every breath.",
]
QUESTIONS = [
    {"question": "What pumps the blood", "choices": ["the heart", "a bone", "the skin of the arm"], "answer": 0},
    {"question": "What holds the body up", "choices": ["water", "bones", "the level of sugar"], "answer": 1},
    {"question": "What lowers sugar in the blood", "choices": ["insulin", "oxygen", "fièvre"], "answer": 0},
    {"question": "Where does water boil", "choices": ["at two degrees", "in the heart", "at one hundred"], "answer": 2},
    {"question": "What takes up oxygen", "choices": ["bones", "lungs", "hair"], "answer": 1},
]
ROLLING = """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
metadata: {version: 1.0}
"""
CHOICE = """
task: quiz
dataset_path: json
dataset_kwargs: {data_files: {test: quiz.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}?\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""


def write_jsonl(path: Path, documents: list[dict]) -> None:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")


def write_suites(folder: Path) -> tuple[Path, Path]:
    """Write both tasks and their suites under a folder; return the paths of the domain and the general suite."""
    tasks = folder / "tasks"
    tasks.mkdir(parents=True)
    (tasks / "texts.yaml").write_text(ROLLING)
    (tasks / "quiz.yaml").write_text(CHOICE)
    write_jsonl(tasks / "texts.jsonl", [{"text": sentence} for sentence in SENTENCES])
    write_jsonl(tasks / "quiz.jsonl", QUESTIONS)
    domain, general = folder / "domain.yaml", folder / "general.yaml"
    domain.write_text("name: questions\naxis: domain\ntasks: [quiz]\ninclude_path: tasks\n")
    general.write_text("name: texts\naxis: general\nlanguage: en\ntasks: [texts]\ninclude_path: [tasks]\n")
    return domain, general


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", model_max_length=256)


def make_model(seed: int = 0, **changes):
    """A random two-layer Llama whose logits differ enough between tokens for its choices to mean something."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 330,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()
