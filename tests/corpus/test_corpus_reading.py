"""Every kind of source gives its documents, or is refused with the file, the line and the remedy."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from small_corpora import texts, write_jsonl

from dapt_merge.corpus import text_files
from dapt_merge.corpus.config import CorpusSource
from dapt_merge.corpus.reading import content_fingerprint, read_source
from dapt_merge.errors import InputError


def source(path: Path, **options: Any) -> CorpusSource:
    return CorpusSource.model_validate({"path": path, **options})


def read(path: Path, **options: Any) -> list[str]:
    return [document.text for document in read_source(source(path, **options))]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(path, **options)
    assert caught.value.remedy
    assert caught.value.exit_code == 2
    return str(caught.value)


def parquet(path: Path, found: list[Any], field: str = "text") -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({field: found}), path)
    return path


def test_every_kind_of_source_gives_the_same_documents(tmp_path: Path) -> None:
    import datasets

    expected = ["Où ? 500 µg.", "", "connaître"]
    jsonl = write_jsonl(tmp_path / "a.jsonl", expected)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    (tmp_path / "c.txt").write_text("\n".join(expected) + "\n", encoding="utf-8")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress((tmp_path / "c.txt").read_bytes()))
    parquet(tmp_path / "e.parquet", expected)
    datasets.Dataset.from_dict({"text": expected}).save_to_disk(tmp_path / "f")
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": expected})}).save_to_disk(tmp_path / "g")
    for name in ("a.jsonl", "b.jsonl.gz", "c.txt", "d.txt.gz", "e.parquet", "f", "g"):
        assert read(tmp_path / name, document="line") == expected, name


def test_a_folder_is_read_to_any_depth_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name, text in {"b/2.jsonl": "two", "a.jsonl": "one", ".hidden/x.jsonl": "no", "b/.x.jsonl": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [text])
    parquet(tmp_path / "c.parquet", ["three"])
    assert read(tmp_path) == ["one", "two", "three"]


def test_a_document_knows_its_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}\n', encoding="utf-8")
    assert [document.place for document in read_source(source(tmp_path / "a.jsonl"))] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:3",
    ]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("file", [("un\ndeux\n\n\ntrois\n", 1)]),
        ("paragraph", [("un\ndeux\n", 1), ("trois\n", 5)]),
        ("line", [("un", 1), ("deux", 2), ("", 3), ("", 4), ("trois", 5)]),
    ],
)
def test_a_plain_text_splits_into_documents_as_asked(
    tmp_path: Path, document: str, expected: list[tuple[str, int]]
) -> None:
    (tmp_path / "c.txt").write_text("un\ndeux\n\n\ntrois\n", encoding="utf-8")
    found = [(d.text, d.number) for d in read_source(source(tmp_path / "c.txt", document=document))]
    assert found == expected


def test_a_file_whose_name_is_no_text_is_read(tmp_path: Path) -> None:
    import os

    name = os.fsencode(tmp_path) + b"/notes-\xe9.jsonl"
    with open(name, "wb") as file:
        file.write(b'{"text": "a"}\n')
    (document,) = read_source(source(tmp_path))
    assert document.place.encode() == os.fsencode(tmp_path) + b"/notes-?.jsonl:1"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "é"}\n', encoding="utf-8-sig")
    assert read(tmp_path / "c.jsonl") == ["é"]


def test_a_missing_file_is_named_with_its_nearest_sibling(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "notes.jsonl", ["x"])
    assert "Did you mean 'notes.jsonl'?" in refusal(tmp_path / "note.jsonl")


def test_a_broken_line_is_named_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n\n{"text": "b"\n', encoding="utf-8")
    message = refusal(tmp_path / "c.jsonl")
    assert "c.jsonl, line 3" in message
    assert "not valid JSON" in message
    assert "column 13" in message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('["a"]', "holds a list"),
        ('{"txt": "a"}', "no field 'text'. Did you mean 'txt'?"),
        ('{"text": 3}', "holds a int"),
        ('{"text": null}', "holds null"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_a_line_without_the_text_is_refused(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "c.jsonl").write_text(f'{{"text": "a"}}\n{line}\n', encoding="utf-8")
    message = refusal(tmp_path / "c.jsonl")
    assert said in message
    assert "line 2" in message


@pytest.mark.parametrize("name", ["c.jsonl", "c.txt"])
def test_another_encoding_is_refused_with_the_conversion(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes('{"text": "sain"}\n{"text": "fièvre"}\n'.encode("latin1"))
    message = refusal(tmp_path / name)
    assert "not UTF-8" in message
    assert "line 2" in message
    assert "iconv -f latin1" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("fièvre".encode("utf-16"), "iconv -f utf-16"),
        (gzip.compress(b"{}", mtime=0), "Name it c.txt.gz"),
        (b"PAR1...", "Name it c.txt.parquet"),
        (b"%PDF-1.7", "pdftotext"),
        (b"text\n\x00\x01\x02", "binary"),
        (b"\x7f\x8b\x02\xff\x11", "binary"),
    ],
)
def test_what_is_no_text_is_recognised(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "c.txt").write_bytes(content)
    assert said in refusal(tmp_path / "c.txt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"text": "a"}, {"text": "b"}]', "jq -c '.[]'"),
        ('[\n{"text": "a"},\n{"text": "b"}\n]', "jq -c '.[]'"),
        ('{\n"text": "a"\n}', "jq -c . OLD"),
        ("Le patient va bien.", "name it .txt"),
    ],
)
def test_json_that_is_not_in_lines_and_text_that_is_no_json_are_told_apart(
    tmp_path: Path, content: str, said: str
) -> None:
    (tmp_path / "c.jsonl").write_text(content, encoding="utf-8")
    message = refusal(tmp_path / "c.jsonl")
    assert said in message
    assert "line 1" in message


def test_a_file_that_may_not_be_read_is_refused_by_reading_and_by_hashing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text("{}", encoding="utf-8")

    def locked(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "open", locked)
    assert "Permission denied" in refusal(file)
    with pytest.raises(InputError, match="Permission denied") as caught:
        content_fingerprint(CorpusSource(path=file))
    assert str(caught.value.where) == str(file)
    assert caught.value.remedy


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").symlink_to("gone.jsonl")
    assert "gone.jsonl" in refusal(tmp_path / "c.jsonl")


def test_one_enormous_line_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "LONGEST_DOCUMENT_BYTES", 2**20)
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "a"}\n' + b"x" * 2**21)
    assert "c.jsonl, line 2" in refusal(tmp_path / "c.jsonl")
    (tmp_path / "c.txt").write_bytes(b"line of text\n" * 2**17)
    assert "paragraph" in refusal(tmp_path / "c.txt")
    assert len(read(tmp_path / "c.txt", document="line")) == 2**17


def test_a_broken_gzip_or_parquet_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    assert "gzip -t" in refusal(tmp_path / "c.jsonl.gz")
    (tmp_path / "c.jsonl.gz").write_bytes(b'{"text": "a"}\n')
    assert "gzip" in refusal(tmp_path / "c.jsonl.gz")
    (tmp_path / "c.parquet").write_bytes(b"PAR1" + b"\0" * 100)
    assert "Parquet" in refusal(tmp_path / "c.parquet")


def test_a_parquet_file_without_the_text_is_refused(tmp_path: Path) -> None:
    assert "Did you mean 'txt'?" in refusal(parquet(tmp_path / "c.parquet", ["a"], "txt"))
    assert "row 2" in refusal(parquet(tmp_path / "d.parquet", ["a", None]))


def test_a_data_set_without_the_split_or_the_field_is_refused(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"body": ["a"]})
    datasets.DatasetDict({"training": rows}).save_to_disk(tmp_path / "d")
    assert "Did you mean 'training'?" in refusal(tmp_path / "d")
    assert "no field 'text'" in refusal(tmp_path / "d", split="training")
    (tmp_path / "d" / "training" / "state.json").write_text("{", encoding="utf-8")
    assert "cannot be opened" in refusal(tmp_path / "d", split="training")


@pytest.mark.parametrize(("name", "said"), [("c.zip", "Convert it"), ("c.json", "jq"), ("c.pdf.gz", "Convert it")])
def test_other_kinds_of_file_are_refused_with_the_conversion(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert said in refusal(tmp_path / name)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert "no readable file" in refusal(tmp_path)


def test_a_hub_data_set_that_is_not_there_is_refused_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="offline: HF_HUB_OFFLINE is set"):
        list(read_source(CorpusSource(hub="nobody/nothing")))


def test_a_hub_data_set_is_streamed_online_and_read_from_the_cache_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    # A folder of files stands for a hub data set: `load_dataset` takes both.
    write_jsonl(tmp_path / "train.jsonl", ["a", "b"])
    hub = CorpusSource(hub=str(tmp_path))
    for offline in (False, True):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
        assert [document.text for document in read_source(hub)] == ["a", "b"]
    assert content_fingerprint(hub) == content_fingerprint(hub)


def test_the_fingerprint_follows_content_and_options_not_names(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "a.jsonl", texts(3, 1))
    other = write_jsonl(tmp_path / "b.jsonl", texts(3, 1))
    assert content_fingerprint(source(one)) == content_fingerprint(source(other))
    assert content_fingerprint(source(one)) != content_fingerprint(source(one, text_field="body"))
    write_jsonl(other, texts(3, 2))
    assert content_fingerprint(source(one)) != content_fingerprint(source(other))
