"""Vocabularies as DAPT leaves them: added tokens, padded rows, tokenizers of other kinds; and what the output says."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_models import CONFIG, random_weights, save_model
from safetensors.torch import load_file, save_file
from tokenized_models import byte_pairs, save_tokenized, with_added

from dapt_merge import ResidentMerger, make_recipe, merge, open_checkpoint
from dapt_merge.checkpoints import gathering, scratch
from dapt_merge.checkpoints.alignment import align
from dapt_merge.checkpoints.token_sources import TokenizerSettings
from dapt_merge.checkpoints.vocabulary import compare_vocabularies, token_ids
from dapt_merge.errors import InputError
from dapt_merge.merging.live import model_from_config
from dapt_merge.merging.verification import verify_merge

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def table(folder, name=EMBEDDING):
    return open_checkpoint(folder).read(name)


# --- padded rows ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def padded(request, tmp_path_factory):
    """Return a Qwen-like base with 32 rows for 20 tokens, and a DAPT model that took two of the spare rows."""
    root = tmp_path_factory.mktemp("padded")
    kind = {"family": "Qwen2", "tie_word_embeddings": request.param, "rows": 32}
    base = save_tokenized(root / "base", byte_pairs(), 0, **kind)
    dapt = save_tokenized(root / "dapt", with_added(byte_pairs(), "<med>", pad="<pad>"), 1, **kind)
    return base, dapt, [EMBEDDING] if request.param else [EMBEDDING, HEAD]


def test_padded_rows_are_kept_and_a_new_token_in_one_of_them_is_no_reason_to_move_the_others(padded, tmp_path):
    base, dapt, tables = padded
    lazy = merge(base, dapt, "linear", weight=0.25, tokenizer_source="union")
    report = lazy.save(tmp_path / "out")
    assert report.vocabulary["rows"] == 32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 32
    for name in tables:
        merged, one, other = lazy[name], table(base, name), table(dapt, name)
        assert len(merged) == 32
        torch.testing.assert_close(merged[:20], 0.75 * one[:20] + 0.25 * other[:20])
        assert torch.equal(merged[20:22], other[20:22])  # <med> and <pad>: the base's spare rows mean nothing
        torch.testing.assert_close(merged[22:], 0.75 * one[22:] + 0.25 * other[22:])
    model = lazy.to_model()
    assert torch.equal(model.get_input_embeddings().weight, lazy[EMBEDDING])


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_end_points_of_padded_models_are_exact(padded, weight):
    base, dapt, tables = padded
    lazy = merge(base, dapt, "linear", weight=weight, tokenizer_source="base")
    for name in tables:
        expected = table(dapt if weight else base, name).clone()
        expected[20:22] = table(base, name)[20:22]
        assert torch.equal(lazy[name], expected)


def test_padding_to_a_multiple_adds_to_the_rows_that_are_there(padded):
    base, dapt, _ = padded
    rows = []
    for multiple in (1, 8, 24):
        padding = {"source": "base", "pad_to_multiple_of": multiple}
        rows.append(len(merge(base, dapt, "linear", weight=0.5, tokenizer=padding)[EMBEDDING]))
    assert rows == [32, 32, 48]


def test_a_tokenizer_larger_than_the_embedding_is_told_of(tmp_path):
    base = save_tokenized(tmp_path / "base", byte_pairs(), 0)
    with_added(byte_pairs(), "<late>").save_pretrained(base)
    lazy = merge(base, base, "linear", weight=0.5, tokenizer_source="base")
    assert any("'<late>'" in warning and "zeros" in warning for warning in lazy.plan.warnings)
    assert lazy[EMBEDDING].shape[0] == 21
    assert not lazy[EMBEDDING][20].any()


def test_a_resized_vocabulary_is_refused_by_its_tokens_and_one_that_is_only_padded_by_its_rows(resized, tmp_path):
    with pytest.raises(InputError, match=r"2 tokens differ, the first is '<med>': id none in .*base, 20 in .*dapt"):
        merge(*resized, "linear", weight=0.5)
    padded = save_tokenized(tmp_path / "padded", byte_pairs(), 1, rows=24)
    with pytest.raises(InputError, match=r"vocab_size is 20 in .* and 24 in") as error:
        merge(resized[0], padded, "linear", weight=0.5)
    assert "tokenizer_source: base" in str(error.value.remedy)
    lazy = merge(resized[0], padded, "linear", weight=0.5, tokenizer_source="base")
    torch.testing.assert_close(lazy[EMBEDDING], (table(resized[0]) + table(padded)[:20]) / 2)


# --- what the output carries ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resized(tmp_path_factory):
    """Return a base, and a DAPT model with a pad token, a word of its own and an embedding resized to them."""
    root = tmp_path_factory.mktemp("resized")
    base = save_tokenized(root / "base", byte_pairs(), 0)
    return base, save_tokenized(root / "dapt", with_added(byte_pairs(), "<med>", pad="<pad>"), 1)


def test_the_unions_tokenizer_loads_and_keeps_what_an_added_token_was(resized, tmp_path):
    from transformers import AutoTokenizer

    merge(*resized, "linear", weight=0.5, tokenizer_source="union").save(tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.get_vocab() == token_ids(open_checkpoint(resized[1]))
    text = "abc<med>d<pad>"
    assert found.tokenize(text) == AutoTokenizer.from_pretrained(resized[1]).tokenize(text)
    added = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    assert {entry["content"]: entry["special"] for entry in added} == {
        "<s>": True, "</s>": True, "<med>": False, "<pad>": True
    }  # fmt: skip


def test_special_tokens_keep_their_meaning_when_their_ids_move(tmp_path):
    base = save_tokenized(tmp_path / "base", byte_pairs(), 0)
    longer = save_tokenized(tmp_path / "longer", byte_pairs(merges=(("a", "b"), ("c", "d"), ("e", "f"))), 1)
    (base / "generation_config.json").write_text(json.dumps({"bos_token_id": 18, "eos_token_id": [19], "top_k": 5}))
    lazy = merge(base, longer, "linear", weight=0.5, tokenizer_source=str(longer))
    lazy.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ids = token_ids(open_checkpoint(longer))
    assert (config["bos_token_id"], config["eos_token_id"]) == (ids["<s>"], ids["</s>"]) == (19, 20)
    assert generation == {"bos_token_id": 19, "eos_token_id": [20], "top_k": 5}
    assert lazy.to_model().generation_config.eos_token_id == [20]


def test_the_report_says_which_token_went_where_and_inputs_are_known_by_their_own_content(resized, tmp_path):
    base, dapt = resized
    report = merge(base, dapt, "linear", weight=0.5, tokenizer_source="base").save(tmp_path / "out")
    found = report.tokens[str(dapt)]
    assert (found["tokens"], found["same"], found["moved"], found["dropped"]) == (22, 20, 0, 2)
    assert found["examples"] == {"<med>": [20, None], "<pad>": [21, None]}
    assert report.inputs[str(dapt)] == open_checkpoint(dapt).fingerprint()
    assert verify_merge(tmp_path / "out").same


def test_another_tokenizer_with_the_same_weights_is_another_merge(resized, tmp_path):
    base, dapt = resized
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    for file in ("model.safetensors", "config.json", "tokenizer_config.json"):
        (swapped / file).write_bytes((dapt / file).read_bytes())
    text = (dapt / "tokenizer.json").read_text()
    (swapped / "tokenizer.json").write_text(text.replace("<med>", "<new>"))
    one, other = (merge(base, m, "linear", weight=0.5, tokenizer_source="union").report() for m in (dapt, swapped))
    assert list(one.inputs.values()) == list(other.inputs.values())
    assert one.fingerprint != other.fingerprint
    assert one.vocabulary["fingerprint"] != other.vocabulary["fingerprint"]


def test_a_live_model_refuses_a_recipe_that_changes_its_vocabulary(resized):
    base = resized[0]
    checkpoints = {"base": open_checkpoint(base)}
    merger = ResidentMerger(
        model_from_config(checkpoints["base"], torch.float32), {**checkpoints, "same": open_checkpoint(base)}
    )
    with pytest.raises(InputError, match="vocabulary") as error:
        merger.apply(make_recipe("base", ["same"], "linear", weight=0.5, tokenizer_source="union"))
    assert "to_model" in str(error.value.remedy)


# --- single tokens ----------------------------------------------------------------------------------------------------


def test_a_row_or_a_token_that_is_not_there_is_refused(resized):
    base, dapt = map(str, resized)
    for entry, saying in (
        ({"source": base}, "no token '<med>'"),
        ({"source": {"kind": "model_token", "model": base, "token": "</S>"}}, "Did you mean '</s>'"),
        ({"source": {"kind": "model_token", "model": base, "token_id": 20}}, "no row 20: it has 20"),
        ({"source": "elsewhere"}, "none of the models"),
    ):
        with pytest.raises(InputError, match=saying) as error:
            merge(base, dapt, "linear", weight=0.5, tokenizer={"source": "union", "tokens": {"<med>": entry}})
        assert str(error.value.where).startswith("tokenizer.tokens")


def test_a_token_entry_without_effect_is_told_of(resized):
    base, dapt = map(str, resized)
    tokens = {"a": {"source": {"kind": "zero"}}}
    lazy = merge(base, dapt, "linear", weight=0.5, tokenizer={"source": "union", "tokens": tokens})
    assert any("tokenizer.tokens.a changes nothing" in warning for warning in lazy.plan.warnings)


# --- other tokenizer files --------------------------------------------------------------------------------------------


def sentencepiece(folder, name="tokenizer.model", words=("fever", "cough"), size=60):
    """Write a small SentencePiece model into a folder."""
    import sentencepiece as spm

    text = folder / "corpus.txt"
    text.write_text("\n".join(f"the patient has {words[i % 2]} number {i}" for i in range(200)))
    spm.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "sp"), vocab_size=size, model_type="bpe", minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "sp.model").rename(folder / name)
    text.unlink()
    (folder / "sp.vocab").unlink()
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Return Llama models whose tokenizers are SentencePiece files alone."""
    root = tmp_path_factory.mktemp("pieces")
    folders = []
    for seed, words in enumerate((("fever", "cough"), ("fever", "rash"))):
        folder = save_model(root / words[1], random_weights(seed), CONFIG, tokens=None)
        folders.append(sentencepiece(folder, words=words))
    return folders


def test_pieces_are_read_and_two_different_vocabularies_of_pieces_are_refused(pieces):
    import sentencepiece as spm

    reader = spm.SentencePieceProcessor(model_file=str(pieces[0] / "tokenizer.model"))
    assert token_ids(open_checkpoint(pieces[0])) == {reader.id_to_piece(i): i for i in range(len(reader))}
    with pytest.raises(InputError, match="two different vocabularies") as error:
        merge(*pieces, "linear", weight=0.5)
    assert "tokenizer_source" in str(error.value.remedy)


def test_models_with_nothing_but_pieces_merge_by_token_and_the_output_has_a_tokenizer(pieces, tmp_path):
    from transformers import AutoTokenizer

    lazy = merge(*pieces, "linear", weight=0.5, tokenizer_source="union")
    lazy.save(tmp_path / "out")
    ids, own = token_ids(open_checkpoint(tmp_path / "out")), [token_ids(open_checkpoint(p)) for p in pieces]
    assert set(ids) == set(own[0]) | set(own[1])
    tables = [table(folder) for folder in pieces]
    for token in ids:
        rows = [rows[known[token]] for rows, known in zip(tables, own, strict=True) if token in known]
        torch.testing.assert_close(lazy[EMBEDDING][ids[token]], sum(rows) / len(rows))
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.get_vocab() == ids
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_pieces_and_the_tokenizer_json_made_of_them_are_one_vocabulary(pieces, tmp_path):
    from transformers import AutoTokenizer

    saved = save_model(tmp_path / "saved", random_weights(5), CONFIG, tokens=None)
    AutoTokenizer.from_pretrained(pieces[0]).save_pretrained(saved)
    assert not (saved / "tokenizer.model").exists()
    assert not [w for w in merge(pieces[0], saved, "linear", weight=0.5).plan.warnings if "vocabular" in w]
    with pytest.raises(InputError, match="two different vocabularies"):
        merge(pieces[1], saved, "linear", weight=0.5)


def test_a_class_that_shifts_the_pieces_is_asked_for_the_ids(tmp_path):
    config = {"model_type": "xlm-roberta"}
    folder = save_model(tmp_path / "m", random_weights(0), config, tokens=None)
    ids = token_ids(open_checkpoint(sentencepiece(folder, "sentencepiece.bpe.model")))
    assert (ids["<s>"], ids["<pad>"], ids["</s>"], ids["<unk>"]) == (0, 1, 2, 3)


def test_garbled_pieces_are_an_error_in_three_parts(tmp_path):
    folder = save_model(tmp_path / "m", random_weights(0), CONFIG, tokens=None)
    (folder / "tokenizer.model").write_bytes(b"no pieces")
    with pytest.raises(InputError, match="cannot read this tokenizer") as error:
        token_ids(open_checkpoint(folder))
    assert error.value.remedy
    assert error.value.where == str(folder)


def test_tokens_added_beside_a_plain_vocabulary_count(tmp_path):
    folder = save_model(tmp_path / "m", random_weights(0), CONFIG, tokens=None)
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"2": {"content": "<pad>"}}}))
    assert token_ids(open_checkpoint(folder)) == {"a": 0, "b": 1, "<pad>": 2}


def test_a_model_without_a_tokenizer_beside_one_that_has_it_is_told_of(resized, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in ("model.safetensors", "config.json"):
        (bare / file).write_bytes((resized[0] / file).read_bytes())
    lazy = merge(resized[0], bare, "linear", weight=0.5)
    assert any("not compared" in w and "bare has no tokenizer" in w for w in lazy.plan.warnings)
    lazy = merge(resized[0], bare, "linear", weight=0.5, tokenizer_source="base")
    assert any("taken to have that of" in w for w in lazy.plan.warnings)


def test_a_comparison_names_tokens_with_both_ids(resized, tmp_path):
    other = save_tokenized(tmp_path / "other", byte_pairs("ba" + "cdefghijklmnop"), 3, rows=24)
    found = compare_vocabularies(open_checkpoint(resized[0]), open_checkpoint(other))
    assert (found.same, found.moved, found.moved_examples) == (18, 2, {"a": (0, 1), "b": (1, 0)})
    assert (found.base_rows, found.model_rows) == (20, 24)
    assert "'a' 0 → 1" in " ".join(found.sentences())
    assert "24 rows for 20 tokens in the model" in found.sentences()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_tables_beyond_the_limit_lie_in_a_file_without_a_name_and_are_filled_by_runs(resized, monkeypatch, tmp_path):
    expected = merge(*resized, "linear", weight=0.3, tokenizer_source="union")
    monkeypatch.setattr(scratch, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(gathering, "_CHUNK_ELEMENTS", 64)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lazy = merge(*resized, "linear", weight=0.3, tokenizer_source="union")
    assert all(torch.equal(lazy[name], expected[name]) for name in expected)
    aligned = lazy.plan.checkpoints[str(resized[0])]
    assert aligned.read(EMBEDDING).data_ptr() == aligned.read(EMBEDDING).data_ptr()  # gathered once
    assert list(tmp_path.iterdir()) == []


def test_aligning_large_bfloat16_embeddings_takes_no_memory_of_their_size(tmp_path):
    rows, tokens = 60_000, {f"t{i}": i for i in range(59_000)}
    config = CONFIG | {"vocab_size": rows, "hidden_size": 512}
    checkpoints = {}
    for number, name in enumerate(("base", "dapt")):
        folder = tmp_path / name
        folder.mkdir()
        save_file(
            {EMBEDDING: torch.full((rows, 512), number + 1.0, dtype=torch.bfloat16)}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text(json.dumps(config))
        vocabulary = {"model": {"vocab": tokens if number else tokens | {"<extra>": 59_000}}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
        tokens = {token: 58_999 - row for token, row in tokens.items()}
        checkpoints[name] = open_checkpoint(folder)
    alignment = align(checkpoints, TokenizerSettings(source="base"))
    aligned = gathering.aligned_checkpoints(checkpoints, alignment)["dapt"]
    before = anonymous_bytes()
    found = aligned.read(EMBEDDING)  # 61 MB as stored, 123 MB in float32
    assert found.dtype == torch.bfloat16
    assert (found[0, 0], found[59_000, 0]) == (2, 1)
    allowance = 30_000_000
    assert anonymous_bytes() - before < found.nbytes + allowance


def anonymous_bytes():
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


def test_a_temporary_folder_without_room_is_an_error_with_the_remedy(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch.os, "posix_fallocate", full)
    monkeypatch.setattr(scratch, "IN_MEMORY_BYTES", 0)
    with pytest.raises(InputError, match="No space left") as error:
        scratch.scratch_tensor((4, 4), torch.float32)
    assert "TMPDIR" in str(error.value.remedy)


# --- properties -------------------------------------------------------------------------------------------------------

names = st.lists(st.sampled_from([f"w{i}" for i in range(12)]), min_size=1, max_size=10, unique=True)
vocabularies = st.lists(st.tuples(names, st.integers(0, 4)), min_size=2, max_size=4)


def written(root, vocabularies):
    """Save a table for each vocabulary; row and model can be read off every number."""
    opened = {}
    for number, (tokens, padding) in enumerate(vocabularies):
        folder = root / f"m{number}"
        folder.mkdir(parents=True)
        rows = len(tokens) + padding
        values = 100 * number + torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, 3)
        save_file({EMBEDDING: values.contiguous()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))
        vocabulary = {"model": {"vocab": {token: row for row, token in enumerate(tokens)}}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(vocabulary))
        opened[f"m{number}"] = open_checkpoint(folder)
    return opened


@settings(max_examples=60)
@given(vocabularies=vocabularies, source=st.sampled_from(["base", "union", "m1"]), multiple=st.sampled_from([None, 8]))
def test_ids_are_a_bijection_on_shared_tokens_and_every_row_has_one_source(
    tmp_path_factory, vocabularies, source, multiple
):
    opened = written(tmp_path_factory.mktemp("drawn"), vocabularies)
    alignment = align(opened, TokenizerSettings(source=source, pad_to_multiple_of=multiple))
    assert sorted(alignment.tokens.values()) == list(range(len(alignment.tokens)))
    assert alignment.rows % (multiple or 1) == 0
    wanted = set().union(*(tokens for tokens, _ in vocabularies)) if source == "union" else None
    giver = vocabularies[1 if source == "m1" else 0]
    assert set(alignment.tokens) == (wanted or set(giver[0]))
    assert alignment.rows >= len(giver[0]) + giver[1]
    for label, (tokens, _) in zip(opened, vocabularies, strict=True):
        places = alignment.places[label]
        own = {token: row for row, token in enumerate(tokens)}
        shared = [token for token in alignment.tokens if token in own]
        assert [int(places[alignment.tokens[token]]) for token in shared] == [own[token] for token in shared]
        used = places[places >= 0]
        assert len(used.unique()) == len(used)


@settings(max_examples=40)
@given(vocabularies=vocabularies, source=st.sampled_from(["base", "union"]), data=st.data())
def test_at_an_end_point_every_token_of_the_model_has_its_own_row_byte_for_byte(
    tmp_path_factory, vocabularies, source, data
):
    opened = written(tmp_path_factory.mktemp("drawn"), vocabularies)
    chosen = data.draw(st.integers(1, len(opened) - 1))
    base, dapt = opened["m0"].folder, opened[f"m{chosen}"].folder
    lazy = merge(base, dapt, "linear", weight=1.0, tokenizer_source=source)
    merged, stored = lazy[EMBEDDING], load_file(dapt / "model.safetensors")[EMBEDDING]
    own = token_ids(open_checkpoint(dapt))
    base_table, base_ids = load_file(base / "model.safetensors")[EMBEDDING], token_ids(open_checkpoint(base))
    for token, row in lazy.plan.alignment.tokens.items():
        expected = stored[own[token]] if token in own else base_table[base_ids[token]]
        assert torch.equal(merged[row], expected)


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_tells_which_tokens_differ_and_that_a_merge_would_be_refused(resized):
    import typer
    from typer.testing import CliRunner

    from dapt_merge.cli.inspect import inspect

    app = typer.Typer()
    app.command()(inspect)
    arguments = [str(resized[0]), str(resized[1])]
    shown = CliRunner().invoke(app, arguments).stdout
    assert "vocabulary: 20 of 20 tokens have the same id in both" in shown
    assert "vocabulary: 2 only in the model: '<med>' 20, '<pad>' 21" in shown
    assert "a merge would be refused" in shown
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["dapt"][0]
    tokens = found["compatibility"]["tokens"]
    assert (tokens["same"], tokens["only_in_model"], tokens["model_rows"]) == (20, 2, 22)


def test_a_checkpoint_is_aligned_to_its_base_by_a_recipe_that_merges_nothing(tmp_path):
    """What a study's message tells to do with a checkpoint of another vocabulary."""
    base = save_tokenized(tmp_path / "base", byte_pairs(), 0)
    dapt = save_tokenized(tmp_path / "dapt", with_added(byte_pairs(), "<med>"), 1)
    recipe = {"merge_method": "passthrough", "models": [{"model": str(dapt)}], "tokenizer_source": str(base)}
    merge(recipe=recipe).save(tmp_path / "out")
    assert token_ids(open_checkpoint(tmp_path / "out")) == token_ids(open_checkpoint(base))
    assert torch.equal(table(tmp_path / "out"), table(dapt)[: len(table(base))])
    merge(base, tmp_path / "out", "linear", weight=0.5).save(tmp_path / "merged")
