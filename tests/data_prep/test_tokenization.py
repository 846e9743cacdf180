import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.cleaning import clean_wikitext
from data_prep.errors import ConfigError, DataError
from data_prep.sentencepiece_models import save_as_tokenizer
from data_prep.shards import tokenizer_hash
from data_prep.tokenization import (
    MemoEngine,
    ReferenceEngine,
    Tokens,
    first_difference,
    load_reference,
    make_engine,
    memo_scheme,
    save_tokenizer,
    special_ids,
)
from data_prep.tokenizer_tools import main as tokenizer_main

ODD = [
    "",
    " ",
    "two  spaces and  more ",
    " lead",
    "tab\tand\nline\nfeed",
    "[SEP] written [CLS] out [UNK]",
    "<s> and </s> written",
    "naïve café, Ünïcode; 東京は首都。 e\u0301 \u0301x",
    "zero\u200bwidth, nbsp\u00a0here, \u3000wide",
    "don't U.S.A.'s 3.14, (a), [b] -- ... ., , . !",
    "\x01\x00 controls \x1c\x85",
    "x" * 300,
    "emoji 😀 and ▁ mark",
]


@pytest.fixture(scope="module")
def texts(pages) -> list[str]:
    return [clean_wikitext(page.text) for page in pages[3:20]]


@pytest.fixture(scope="module")
def bert(tokenizer_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    save_tokenizer(str(tokenizer_folder), folder)
    return folder


@pytest.fixture(scope="module")
def sentencepiece_folder(sample, tmp_path_factory) -> Path:
    """A BPE tokenizer of 1,000 pieces, trained by the command."""
    out = tmp_path_factory.mktemp("trained") / "bpe"
    arguments = ["train", "--source", str(sample), "--out", str(out), "--vocab-size", "1000", "--max-megabytes", "0.4"]
    assert tokenizer_main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def byte_level(texts, tmp_path_factory) -> Path:
    """A GPT-2 kind of tokenizer of 1,500 pieces."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("bytes")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=1500, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", ["bert", "metaspace", "byte-level"])
def test_the_memo_gives_the_ids_of_the_reference(kind, bert, sentencepiece_folder, byte_level, texts):
    folder = {"bert": bert, "metaspace": sentencepiece_folder, "byte-level": byte_level}[kind]
    tokenizer = load_reference(folder)
    scheme = memo_scheme(tokenizer)
    assert scheme is not None and scheme.kind == kind
    memo, reference = MemoEngine(tokenizer, scheme), ReferenceEngine(tokenizer)
    for batch in (texts, ODD, texts[:2] + ODD, [text for text in ODD if text], [], texts):
        assert first_difference(memo, reference, batch) == ""


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=5))
def test_the_memo_is_exact_on_any_text(memo_and_reference, texts):
    for memo, reference in memo_and_reference:
        assert first_difference(memo, reference, texts) == ""


@pytest.fixture(scope="module")
def memo_and_reference(bert, sentencepiece_folder, byte_level):
    tokenizers = [load_reference(folder) for folder in (bert, sentencepiece_folder, byte_level)]
    return [(MemoEngine(t, memo_scheme(t)), ReferenceEngine(t)) for t in tokenizers]


def test_the_memo_forgets_when_it_is_full_and_stays_exact(bert, texts, monkeypatch):
    monkeypatch.setattr("data_prep.tokenization.MEMO_ENTRIES", 500)
    tokenizer = load_reference(bert)
    memo, reference = MemoEngine(tokenizer, memo_scheme(tokenizer)), ReferenceEngine(tokenizer)
    for text in texts:
        assert first_difference(memo, reference, [text]) == ""


def test_an_unknown_kind_of_tokenizer_falls_back_and_says_so(byte_level, tmp_path):
    made = json.loads((byte_level / "tokenizer.json").read_text())
    made["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    engine, why = make_engine("memo", tmp_path, [])
    assert engine.name == "huggingface" and "not exact by construction" in why


def test_an_engine_that_differs_on_the_text_is_not_used(bert, monkeypatch):
    def wrong(self, texts):
        tokens = ReferenceEngine(self._tokenizer).encode(texts)
        return Tokens(np.where(tokens.ids == 300, 301, tokens.ids), tokens.offsets)

    monkeypatch.setattr(MemoEngine, "encode", wrong)
    vocabulary = load_reference(bert).get_vocab()
    word = next(word for word, index in vocabulary.items() if index == 300)
    engine, why = make_engine("memo", bert, ["some text", word])
    assert engine.name == "huggingface" and "differs from huggingface" in why and "[301], not [300]" in why
    assert make_engine("memo", bert, ["some text"])[0].name == "memo"


def test_an_engine_that_is_not_installed_is_named_with_the_mend(bert):
    missing = next((name for name in ("nanotoken", "gigatoken") if not _installed(name)), None)
    if missing is None:
        pytest.skip("both optional packages are installed")
    with pytest.raises(ConfigError, match=r"pip install 'capgap\[fast\]'"):
        make_engine(missing, bert, [])  # type: ignore[arg-type]


def _installed(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


@pytest.mark.skipif(not _installed("nanotoken"), reason="the optional package nanotoken is not installed")
def test_nanotoken_gives_the_ids_of_the_reference(bert, texts):
    engine, why = make_engine("nanotoken", bert, texts + ODD)
    assert engine.name == "nanotoken", why


@pytest.mark.skipif(not _installed("gigatoken"), reason="the optional package gigatoken is not installed")
def test_gigatoken_gives_the_ids_of_the_reference(sentencepiece_folder, texts):
    engine, why = make_engine("gigatoken", sentencepiece_folder, texts)
    assert engine.name == "gigatoken", why


def test_special_tokens_written_in_a_text_are_text(bert):
    tokenizer = load_reference(bert)
    assert special_ids(bert, tokenizer).sep not in ReferenceEngine(tokenizer).encode(["a [SEP] b"]).ids


def test_truncation_and_padding_saved_in_a_tokenizer_are_not_applied(bert, tmp_path):
    made = json.loads((bert / "tokenizer.json").read_text())
    made["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    assert len(ReferenceEngine(load_reference(tmp_path)).encode(["a b c d e f g"]).ids) == 7


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_sentencepiece_model_gives_the_same_ids_as_a_tokenizer_folder(model_type, sample, texts, tmp_path):
    import sentencepiece
    from transformers import AutoTokenizer

    out = tmp_path / "made"
    arguments = ["train", "--source", str(sample), "--out", str(out), "--vocab-size", "600", "--max-megabytes", "0.2"]
    assert tokenizer_main([*arguments, "--model-type", model_type]) == 0
    model = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    only_model = tmp_path / "only"
    only_model.mkdir()
    shutil.copy(out / "tokenizer.model", only_model)
    again = tmp_path / "again"
    again.mkdir()
    save_tokenizer(str(only_model), again)
    assert tokenizer_hash(only_model) == tokenizer_hash(again) == tokenizer_hash(out)
    reference = ReferenceEngine(load_reference(again))
    # Unigram: sentencepiece adds up float32 and tokenizers float64, so that ties in long texts can fall differently.
    lines = texts if model_type == "bpe" else [line for text in texts for line in text.split("\n")]
    tokens = reference.encode(lines)
    assert np.split(tokens.ids, tokens.offsets[1:-1])[0].tolist() == model.encode(lines[0])
    assert tokens.ids.tolist() == [index for line in lines for index in model.encode(line)]
    loaded = AutoTokenizer.from_pretrained(str(again))
    assert loaded.eos_token == "</s>" and loaded("A test.")["input_ids"][0] == loaded.bos_token_id


def test_an_extended_tokenizer_keeps_the_old_ids_and_tells_how_to_resize(sentencepiece_folder, sample, tmp_path):
    import sentencepiece

    extra, out = tmp_path / "extra", tmp_path / "out"
    (tmp_path / "german.txt").write_text("Die Geschwindigkeitsbegrenzung gilt überall in Österreich. " * 300)
    common = ["train", "--out", str(extra), "--vocab-size", "330"]
    assert tokenizer_main([*common, "--source", str(tmp_path / "german.txt")]) == 0
    base_model, extra_model = sentencepiece_folder / "tokenizer.model", extra / "tokenizer.model"
    assert tokenizer_main(["extend", "--base", str(base_model), "--extra", str(extra_model), "--out", str(out)]) == 0
    base = sentencepiece.SentencePieceProcessor(model_file=str(base_model))
    new = sentencepiece.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    assert [new.id_to_piece(i) for i in range(len(base))] == [base.id_to_piece(i) for i in range(len(base))]
    recipe = json.loads((out / "embedding_resize.json").read_text())
    assert recipe["new_vocab_size"] == len(new) > len(base) == recipe["old_vocab_size"]
    assert recipe["padded_vocab_size"] % 64 == 0 and 0 <= recipe["padded_vocab_size"] - len(new) < 64
    for row in recipe["rows"]:
        assert row["mean_of"] and max(row["mean_of"]) < len(base)
        assert base.decode(row["mean_of"]).strip() == row["piece"].replace("\u2581", " ").strip()
    text = "Geschwindigkeitsbegrenzung in Österreich"
    assert len(new.encode(text)) < len(base.encode(text))
    reference = ReferenceEngine(load_reference(out))
    assert reference.encode([text]).ids.tolist() == new.encode(text)


def test_a_tokenizer_mistake_is_one_line(tmp_path, capsys, sentencepiece_folder):
    model = str(sentencepiece_folder / "tokenizer.model")
    assert tokenizer_main(["extend", "--base", "none.model", "--extra", model, "--out", str(tmp_path / "o")]) == 3
    (tmp_path / "bad.model").write_text("not a model")
    bad = str(tmp_path / "bad.model")
    assert tokenizer_main(["extend", "--base", model, "--extra", bad, "--out", str(tmp_path / "o")]) == 3
    assert tokenizer_main(["extend", "--base", model, "--extra", model, "--out", str(sentencepiece_folder)]) == 2
    (tmp_path / "tiny.txt").write_text("A tiny text, but a hundred characters it has.\n" * 3)
    tiny = ["train", "--source", str(tmp_path / "tiny.txt"), "--out", str(tmp_path / "t")]
    assert tokenizer_main(tiny) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 4 and "--vocab-size (32000)" in lines[3]


def test_a_damaged_or_empty_tokenizer_folder_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_reference(tmp_path)
    with pytest.raises(DataError, match="damaged file"):
        tokenizer_hash(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no tokenizer\.json, vocab\.txt or tokenizer\.model"):
        tokenizer_hash(tmp_path / "empty")
    with pytest.raises(DataError, match="word or char model"):
        _word_model(tmp_path / "word.model")
        save_as_tokenizer(tmp_path / "word.model", tmp_path)


def _word_model(path: Path) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 5), model_writer=model, vocab_size=7, model_type="word", minloglevel=2
    )
    path.write_bytes(model.getvalue())
