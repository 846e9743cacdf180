"""Text to token ids: any tokenizer as a folder, and engines that give the same ids faster.

An engine encodes many texts at once, without special tokens, into one flat array and offsets. `huggingface` is the
reference. `memo` remembers the ids of the pieces between spaces, which repeat; it is used only where that is exact by
construction of the tokenizer. `nanotoken` (WordPiece) and `gigatoken` (BPE) are optional packages. Every engine but the
reference is compared with it, id by id, on the first texts it is to encode.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from data_prep.errors import ConfigError, DataError
from data_prep.model_folders import package_folder
from data_prep.sentencepiece_models import METASPACE, save_as_tokenizer
from data_prep.shards import id_dtype, tokenizer_hash

EngineName = Literal["memo", "huggingface", "nanotoken", "gigatoken"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
END, CUT = "\x01", "\x00"  # control characters do not occur in cleaned text
IRREGULAR_SPACE = re.compile(rf"\s\s|\A\s|\s\Z|[{END}{CUT}{METASPACE}]")
# The pre-tokenizers of Llama 3 and of Qwen 2 and its successors; GPT-2's is built into ByteLevel.
SPLIT_AT_SPACES = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
}
SAMPLE_CHARACTERS = 100_000  # of text on which an engine must equal the reference
MEMO_ENTRIES = 400_000  # about 100 MB


class Tokens(NamedTuple):
    """The ids of many texts end to end: text i is ids[offsets[i]:offsets[i + 1]]."""

    ids: np.ndarray
    offsets: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        return np.diff(self.offsets)


class Engine(Protocol):
    """Encodes texts without special tokens; special tokens written in a text are plain text."""

    name: EngineName

    def encode(self, texts: Sequence[str]) -> Tokens: ...


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens; None where the tokenizer has none."""

    pad: int | None
    cls: int | None
    sep: int | None
    bos: int | None
    eos: int | None


def save_tokenizer(name: str, folder: Path) -> None:
    """Fills `folder` with tokenizer.json and what else belongs to `name`: a folder, .model or .json file, hub name,
    or `package:NAME` for a folder inside an installed Python package.

    A folder that holds tokenizer.json is copied as it is; everything else goes through transformers.
    """
    source = package_folder(name) if name.startswith("package:") else Path(name)
    if source.is_dir() and (source / "tokenizer.json").is_file():
        for file in TOKENIZER_FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, folder / file)
        return
    if source.is_file() and source.suffix == ".json":
        shutil.copyfile(source, folder / "tokenizer.json")
        return
    if source.is_file() and source.suffix == ".model":
        save_as_tokenizer(source, folder)
        return
    if source.is_dir():
        if (source / "vocab.txt").is_file():
            _save_wordpiece(source, folder)
            return
        if (source / "tokenizer.model").is_file():
            save_as_tokenizer(source / "tokenizer.model", folder)
            return
        raise DataError(
            f"loading tokenizer {name}: no tokenizer.json, vocab.txt or tokenizer.model in the folder - "
            "give a folder made by save_pretrained"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(f"loading tokenizer {name} - no such folder - give a tokenizer folder or a hub name")
    _save_from_hub(name, folder)


def _save_from_hub(name: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.save_pretrained(str(folder))
    except Exception as error:  # transformers raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"loading tokenizer {name}: no folder of that name, and the hub gave: {reason} - "
            f"give a folder, or download it with: hf download {name}"
        ) from None
    if not (folder / "tokenizer.json").is_file():
        raise DataError(f"loading tokenizer {name}: it has no fast version - give a tokenizer with tokenizer.json")


def _save_wordpiece(source: Path, folder: Path) -> None:
    """A BERT folder of vocab.txt only; tokenizer_config.json may say do_lower_case."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import WordPiece as WordPieceDecoder
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing

    from data_prep.shards import folder_vocabulary

    config_file = source / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    vocabulary = folder_vocabulary(source)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if missing := [token for token in special if token not in vocabulary]:
        raise DataError(f"loading tokenizer {source / 'vocab.txt'}: no {missing[0]} - not a BERT vocabulary")
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
    )
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    names = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }
    saved = {"do_lower_case": True, "tokenizer_class": "BertTokenizer", "model_max_length": 512, **config, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(saved, indent=2), encoding="utf-8")
    shutil.copyfile(source / "vocab.txt", folder / "vocab.txt")


def load_reference(folder: Path) -> Any:
    """The tokenizers.Tokenizer of a folder, without truncation, padding or special tokens in text."""
    from tokenizers import Tokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # our processes are the parallelism
    try:
        # Through Python: the library refuses paths that are not UTF-8 in the locale at hand.
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"loading tokenizer {folder / 'tokenizer.json'}: {error} - damaged - copy it again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "[SEP]" written in an article is text
    return tokenizer


def special_ids(folder: Path, tokenizer: Any) -> SpecialIds:
    """The special ids that tokenizer_config.json and special_tokens_map.json name, else those of the usual names."""
    named: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            values = json.loads((folder / file).read_text(encoding="utf-8"))
            named |= {key: value for key, value in values.items() if key.endswith("_token") and value}

    def find(role: str, *usual: str) -> int | None:
        value = named.get(f"{role}_token")
        token = value.get("content") if isinstance(value, dict) else value
        for candidate in (token, *usual):
            if candidate and (index := tokenizer.token_to_id(candidate)) is not None:
                return index
        return None

    return SpecialIds(
        pad=find("pad", "[PAD]", "<pad>"),
        cls=find("cls", "[CLS]"),
        sep=find("sep", "[SEP]"),
        bos=find("bos", "<s>"),
        eos=find("eos", "</s>", "<|endoftext|>") or find("sep", "[SEP]"),  # BERT closes documents with [SEP]
    )


def describe_tokenizer(name: str, folder: Path) -> dict[str, Any]:
    """The manifest's entry: name, hash of the vocabulary, number of ids, special ids."""
    tokenizer = load_reference(folder)
    ids = special_ids(folder, tokenizer)
    vocabulary = tokenizer.get_vocab()
    return {
        "name": name,
        "hash": tokenizer_hash(tokenizer),
        "vocab_size": max(vocabulary.values()) + 1,
        "pad_id": ids.pad,
        "cls_id": ids.cls,
        "sep_id": ids.sep,
        "bos_id": ids.bos,
        "eos_id": ids.eos,
    }


class ReferenceEngine:
    """transformers' own tokenizer, by encode_batch_fast."""

    name: EngineName = "huggingface"

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._dtype = id_dtype(tokenizer.get_vocab_size())

    def encode(self, texts: Sequence[str]) -> Tokens:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return _tokens([encoding.ids for encoding in encodings], self._dtype)


def _tokens(lists: Sequence[Sequence[int]], dtype: np.dtype) -> Tokens:
    counts = np.fromiter(map(len, lists), np.int64, len(lists))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return Tokens(np.fromiter(chain.from_iterable(lists), dtype, int(offsets[-1])), offsets)


@dataclass(frozen=True)
class MemoScheme:
    """How a kind of tokenizer treats spaces, which is what makes a memo of words exact; see `memo_scheme`."""

    kind: Literal["bert", "metaspace", "byte-level"]
    separator: tuple[str, int] | None = None  # a special token that can stand between words encoded together


class Numbering(dict[str, int]):
    """Numbers new keys as they are looked up; `new` are those that came since it was last emptied."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, key: str) -> int:
        number = self[key] = len(self)
        self.new.append(key)
        return number


class MemoEngine:
    """The reference with an exact memory of what stands between two spaces.

    Right for tokenizers that never join text across a space, see `memo_scheme`. A text that the scheme does not cover
    (spaces in a row, for all but BERT) goes to the reference as a whole. Only the look-up of a piece's number is done
    piece by piece; the ids are gathered by number, all at once.
    """

    name: EngineName = "memo"

    def __init__(self, tokenizer: Any, scheme: MemoScheme):
        self._reference = ReferenceEngine(tokenizer)
        self._tokenizer = tokenizer
        self._scheme = scheme
        self._dtype = id_dtype(tokenizer.get_vocab_size())
        self._special = _special_pattern(tokenizer)
        self._forget()

    def _forget(self) -> None:
        self._numbers = Numbering()
        self._ids = np.zeros(0, self._dtype)  # of all pieces, by number, end to end
        self._counts = np.zeros(1, np.int64)
        self._end = self._numbers[END]  # stands between two texts and has no ids
        self._numbers.new.clear()

    def encode(self, texts: Sequence[str]) -> Tokens:
        if not texts:
            return _tokens([], self._dtype)
        if self._scheme.kind == "bert":
            # BERT cuts at punctuation too: fewer different pieces.
            joined = f" {END} ".join(texts).replace("\n", " ").replace(", ", " , ").replace(". ", " . ")
            pieces = joined.split(" ")
        else:
            if any(map(IRREGULAR_SPACE.search, texts)):
                return self._encode_mixed(texts)
            joined = f"{CUT}{END}{CUT}".join(texts)
            # metaspace: a word alone gets the mark that it gets after a space; byte level: the space is the word's
            pieces = joined.replace(" ", CUT if self._scheme.kind == "metaspace" else f"{CUT} ").split(CUT)
        if len(self._numbers) > MEMO_ENTRIES:
            self._forget()
        numbers = np.fromiter(map(self._numbers.__getitem__, pieces), np.int32, len(pieces))
        self._learn()
        counts = self._counts[numbers]
        before = np.cumsum(counts) - counts
        starts = np.cumsum(self._counts) - self._counts
        source = np.repeat(starts[numbers] - before, counts)
        source += np.arange(len(source))
        offsets = np.concatenate([[0], before[numbers == self._end], [len(source)]])
        if len(offsets) != len(texts) + 1:  # a text holds our own END
            return self._reference.encode(texts)
        return Tokens(self._ids[source], offsets)

    def _encode_mixed(self, texts: Sequence[str]) -> Tokens:
        """Irregular texts by the reference, the others from memory."""
        irregular = [index for index, text in enumerate(texts) if IRREGULAR_SPACE.search(text)]
        regular = self.encode(["" if IRREGULAR_SPACE.search(text) else text for text in texts])
        return _replace(regular, irregular, self._reference.encode([texts[index] for index in irregular]))

    def _learn(self) -> None:
        """Encodes the pieces that have a number but no ids yet."""
        pieces, self._numbers.new = self._numbers.new, []
        if self._scheme.separator is None:
            learnt = self._reference.encode(pieces)
        else:
            # A call per piece costs more than the piece: many go as one text, each closed by a special token.
            mark, mark_id = self._scheme.separator
            written, alone = pieces, []
            if self._special.search(" ".join(pieces)):
                alone = [index for index, piece in enumerate(pieces) if self._special.search(piece)]
                written = ["" if self._special.search(piece) else piece for piece in pieces]
            batches = [mark.join(written[start : start + 256]) + mark for start in range(0, len(written), 256)]
            self._tokenizer.encode_special_tokens = False
            marked = self._reference.encode(batches).ids
            self._tokenizer.encode_special_tokens = True
            is_mark = marked == mark_id
            ends = np.flatnonzero(is_mark) - np.arange(len(pieces))
            learnt = Tokens(marked[~is_mark], np.concatenate([[0], ends]))
            learnt = _replace(learnt, alone, self._reference.encode([pieces[index] for index in alone]))
        self._ids = np.concatenate([self._ids, learnt.ids])
        self._counts = np.concatenate([self._counts, learnt.counts])


def memo_scheme(tokenizer: Any) -> MemoScheme | None:
    """How to cut text at spaces without changing an id, or None where nothing proves that.

    BERT: the normaliser works character by character and the pre-tokenizer splits at every space. Llama's kind: every
    space becomes the mark that a word alone gets, and no merge joins anything to a mark that follows it. GPT-2's kind:
    the pre-tokenizer begins a new piece at every single space.
    """
    made = json.loads(tokenizer.to_str())
    normalizer, pre_tokenizer, model = made["normalizer"] or {}, made["pre_tokenizer"] or {}, made["model"]
    if not all(token["special"] for token in made["added_tokens"]):
        return None
    if normalizer.get("type") == "BertNormalizer" and pre_tokenizer.get("type") == "BertPreTokenizer":
        plain = (
            t for t in made["added_tokens"] if not (t["single_word"] or t["lstrip"] or t["rstrip"] or t["normalized"])
        )
        token = next(plain, None)
        return MemoScheme("bert", (token["content"], token["id"]) if token else None)
    if model["type"] != "BPE":
        return None
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": METASPACE}
    prepend = {"type": "Prepend", "prepend": METASPACE}
    by_normalizer = not pre_tokenizer and normalizer.get("normalizers") == [prepend, replace]
    by_pre_tokenizer = (
        not normalizer and pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") != "never"
    )
    if by_normalizer or by_pre_tokenizer:
        inner_mark = re.compile(f"[^{METASPACE}]{METASPACE}")
        return None if any(map(inner_mark.search, model["vocab"])) else MemoScheme("metaspace")
    if normalizer and normalizer.get("type") != "NFC":
        return None
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    patterns = [step.get("pattern", {}).get("Regex") for step in steps[:-1]]
    if (not patterns and steps[-1].get("use_regex")) or (len(patterns) == 1 and patterns[0] in SPLIT_AT_SPACES):
        return MemoScheme("byte-level")
    return None


class NanotokenEngine:
    """WordPiece in Rust with its own word cache (optional package nanotoken)."""

    name: EngineName = "nanotoken"

    def __init__(self, folder: Path, tokenizer: Any):
        nanotoken = _optional("nanotoken")
        self._fast = nanotoken.Tokenizer(str(folder / "tokenizer.json"))
        self._reference = ReferenceEngine(tokenizer)
        self._dtype = id_dtype(tokenizer.get_vocab_size())
        self._special = _special_pattern(tokenizer)

    def encode(self, texts: Sequence[str]) -> Tokens:
        encoded = self._fast.encode_batch(texts, add_special_tokens=False, parallel=False)
        tokens = Tokens(encoded.ids.astype(self._dtype), encoded.offsets)
        return _mend_special(tokens, texts, self._special, self._reference)


class GigatokenEngine:
    """BPE in Rust with its own cache (optional package gigatoken)."""

    name: EngineName = "gigatoken"

    def __init__(self, folder: Path, tokenizer: Any):
        gigatoken = _optional("gigatoken")
        self._fast = gigatoken.Tokenizer(str(folder / "tokenizer.json"))
        self._reference = ReferenceEngine(tokenizer)
        self._dtype = id_dtype(tokenizer.get_vocab_size())
        self._special = _special_pattern(tokenizer)

    def encode(self, texts: Sequence[str]) -> Tokens:
        if not texts:
            return _tokens([], self._dtype)
        import awkward  # what gigatoken answers with

        encoded = self._fast.encode_batch(list(texts), parallel=False)
        offsets = np.concatenate([[0], np.cumsum(awkward.to_numpy(awkward.num(encoded)))])
        tokens = Tokens(awkward.to_numpy(awkward.flatten(encoded)).astype(self._dtype), offsets)
        return _mend_special(tokens, texts, self._special, self._reference)


def _optional(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError:
        raise ConfigError(
            f"tokenizer engine {package}: the package is not installed - "
            "install it with pip install 'capgap[fast]', or use --tokenizer-engine memo"
        ) from None


def _special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Finds the written names of added tokens; nothing, when there are none."""
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    return re.compile("|".join(map(re.escape, added)) or r"(?!)")


def _mend_special(tokens: Tokens, texts: Sequence[str], special: re.Pattern[str], reference: Engine) -> Tokens:
    """Encodes again, by the reference, the rare texts in which the name of a special token is written."""
    marked = [index for index, text in enumerate(texts) if special.search(text)]
    return _replace(tokens, marked, reference.encode([texts[index] for index in marked]))


def _replace(tokens: Tokens, indices: Sequence[int], others: Tokens) -> Tokens:
    """The tokens with those of the texts at `indices` taken from `others`, in the same order."""
    if not indices:
        return tokens
    lists: list[np.ndarray] = np.split(tokens.ids, tokens.offsets[1:-1])
    for index, ids in zip(indices, np.split(others.ids, others.offsets[1:-1]), strict=True):
        lists[index] = ids
    return Tokens(np.concatenate(lists), np.concatenate([[0], np.cumsum([len(ids) for ids in lists])]))


def make_engine(wanted: EngineName, folder: Path, sample: Sequence[str]) -> tuple[Engine, str]:
    """The engine to use, and why another than `wanted` when it is: "" or one sentence for the log.

    `memo` falls back to the reference where it is not exact; every engine does when one id differs on `sample`.
    """
    tokenizer = load_reference(folder)
    reference = ReferenceEngine(tokenizer)
    if wanted == "huggingface":
        return reference, ""
    engine: Engine
    if wanted == "memo":
        scheme = memo_scheme(tokenizer)
        if scheme is None:
            return reference, "memo is not exact by construction for this tokenizer: using huggingface"
        engine = MemoEngine(tokenizer, scheme)
    else:
        try:
            engine = (NanotokenEngine if wanted == "nanotoken" else GigatokenEngine)(folder, tokenizer)
        except ConfigError:
            raise
        except Exception as error:  # the packages refuse tokenizers that they do not know, each in its own way
            return reference, f"{wanted} cannot load this tokenizer ({error}): using huggingface"
    if difference := first_difference(engine, reference, sample):
        return reference, f"{wanted} differs from huggingface on this text ({difference}): using huggingface"
    return engine, ""


def first_difference(engine: Engine, reference: Engine, sample: Sequence[str]) -> str:
    """Where two engines first give different ids, as a phrase; "" when they agree on every text."""
    ours, theirs = engine.encode(sample), reference.encode(sample)
    if np.array_equal(ours.ids, theirs.ids) and np.array_equal(ours.offsets, theirs.offsets):
        return ""
    for index, text in enumerate(sample):
        a = ours.ids[ours.offsets[index] : ours.offsets[index + 1]]
        b = theirs.ids[theirs.offsets[index] : theirs.offsets[index + 1]]
        if not np.array_equal(a, b):
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            return f"text {text[:40]!r}: id {at} is {a[at : at + 1].tolist()}, not {b[at : at + 1].tolist()}"
    return "different offsets"
