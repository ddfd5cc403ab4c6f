"""A corpus is read whole or refused with the file, the line and the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_corpora import notes, write_jsonl

from dapt_merge.errors import InputError
from dapt_merge.pretraining.config import CorpusSource
from dapt_merge.pretraining.corpus import corpus_files, read_documents, tokenise


def source(path: Path, **options: Any) -> CorpusSource:
    return CorpusSource.model_validate({"path": path, **options})


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        [list(read_documents(file, **options)) for file in corpus_files(source(path))]
    assert caught.value.remedy
    return str(caught.value)


def test_a_missing_file_is_named_with_its_nearest_sibling(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "notes.jsonl", ["x"])
    message = refusal(tmp_path / "note.jsonl")
    assert "no such corpus file" in message
    assert "Did you mean 'notes.jsonl'?" in message


def test_a_broken_line_is_named_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": "b"\n', encoding="utf-8")
    message = refusal(file)
    assert "c.jsonl, line 3" in message
    assert "not valid JSON" in message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('["a"]', "holds a list"),
        ('{"txt": "a"}', "no field 'text'. Did you mean 'txt'?"),
        ('{"text": 3}', "holds a int"),
        ('{"text": null}', "holds a NoneType"),
    ],
)
def test_a_line_without_the_text_is_refused(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(f'{{"text": "a"}}\n{line}\n', encoding="utf-8")
    message = refusal(file)
    assert said in message
    assert "line 2" in message


@pytest.mark.parametrize("name", ["c.jsonl", "c.txt"])
def test_another_encoding_is_refused_with_the_conversion(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes('{"text": "sain"}\n{"text": "fièvre"}\n'.encode("latin1"))
    message = refusal(file)
    assert "not UTF-8" in message
    assert "line 2" in message
    assert "iconv -f latin1" in message


def test_utf_16_is_recognised(tmp_path: Path) -> None:
    file = tmp_path / "c.txt"
    file.write_text("fièvre", encoding="utf-16")
    assert "iconv -f utf-16" in refusal(file)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.txt"
    file.write_bytes(b"text\n\x00\x01\x02")
    assert "binary" in refusal(file)


def test_other_kinds_of_file_are_refused_with_the_conversion(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl.gz"
    file.write_bytes(b"\x1f\x8b")
    assert "gunzip" in refusal(file)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "holds no .jsonl or .txt" in refusal(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text('{"text": "é"}\n', encoding="utf-8-sig")
    assert list(read_documents(file)) == ["é"]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("file", ["un\ndeux\n\n\ntrois\n"]),
        ("paragraph", ["un\ndeux\n", "trois\n"]),
        ("line", ["un\n", "deux\n", "\n", "\n", "trois\n"]),
    ],
)
def test_a_plain_text_splits_into_documents_as_asked(tmp_path: Path, document: str, expected: list[str]) -> None:
    file = tmp_path / "c.txt"
    file.write_text("un\ndeux\n\n\ntrois\n", encoding="utf-8")
    assert list(read_documents(file, document=document)) == expected


def test_every_document_is_whole_and_ends_with_the_separator(tmp_path: Path, tokenizer: Any) -> None:
    texts = [*notes(30, 3), " ", "", "long " * 3000]
    corpus = tokenise(source(write_jsonl(tmp_path / "c.jsonl", texts)), tokenizer)
    assert corpus.documents == 31
    assert corpus.empty_documents == 2
    for index, text in enumerate([text for text in texts if text.strip()]):
        ids = corpus.document(index)
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == text
    assert corpus.tokens == sum(len(corpus.document(i)) for i in range(31))


def test_documents_are_found_across_the_chunks_of_a_large_file(tmp_path: Path, tokenizer: Any) -> None:
    texts = [f"{index} {text}" for index, text in enumerate(notes(2500, 4, words=3))]
    corpus = tokenise(source(write_jsonl(tmp_path / "c.jsonl", texts)), tokenizer)
    assert len(corpus.chunks) > 1
    for index in (0, 999, 1000, 1001, 2000, 2499):
        assert tokenizer.decode(corpus.document(index)[:-1]) == texts[index]


def test_a_special_token_spelled_out_in_a_text_stays_text(tmp_path: Path, tokenizer: Any) -> None:
    corpus = tokenise(source(write_jsonl(tmp_path / "c.jsonl", ["a <|end|> b"])), tokenizer)
    assert np.count_nonzero(corpus.document(0) == tokenizer.eos_token_id) == 1


def test_a_corpus_without_text_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    for texts in ([], ["", "  "]):
        with pytest.raises(InputError, match="the corpus is empty"):
            tokenise(source(write_jsonl(tmp_path / "c.jsonl", texts)), tokenizer)


def test_tokens_are_cached_until_the_text_or_the_options_change(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"text": "le patient", "note": "la dose"}) + "\n", encoding="utf-8")
    made: list[int] = []

    def tokenised(**options: Any) -> Any:
        return tokenise(source(file, **options), tokenizer, tmp_path / "cache", made.append)

    first = tokenised()
    assert tokenised().document(0).tolist() == first.document(0).tolist()
    assert len(made) == 1
    assert tokenised(text_field="note").document(0).tolist() != first.document(0).tolist()
    file.write_text('{"text": "le foie"}\n', encoding="utf-8")
    assert tokenised().document(0).tolist() != first.document(0).tolist()
    assert len(made) == 3


def test_a_tokenizer_without_a_separator_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        tokenise(source(write_jsonl(tmp_path / "c.jsonl", ["x"])), bare)
