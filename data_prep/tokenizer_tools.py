"""The commands `capgap tokenizer train` and `capgap tokenizer extend`: new sentencepiece models, and larger ones."""

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_prep.errors import ConfigError, DataError, reports_errors
from data_prep.files import make_folder, replacing_folder, write_json
from data_prep.parts import Accounts, PartMaker, PartOptions
from data_prep.progress import Progress
from data_prep.sentencepiece_models import BPE, NORMAL, read_model, save_as_tokenizer
from data_prep.sources import Document, open_source, read_source

MULTIPLE = 64  # embedding rows: matrix sizes that GPUs like
MAX_LINE = 4000  # characters; sentencepiece drops longer lines, so they are cut


@dataclass(frozen=True)
class Train:
    """Trains a sentencepiece model on cleaned text and saves it as a tokenizer folder."""

    source: tuple[str, ...]
    """What capgap prepare reads: dumps, text, datasets; best a folder made with --rows text."""
    out: Path
    """Tokenizer folder to write."""
    vocab_size: int = 32000
    """Number of pieces, bytes and special tokens included."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """Merges, as in Llama, or a unigram language model, as in T5."""
    character_coverage: float = 0.9995
    """Share of the text's characters that get a piece; the rest is written in bytes. 1.0 for small alphabets."""
    max_megabytes: float = 1000.0
    """Training text to read; more changes little and needs memory."""
    threads: int = 1
    """Threads of the trainer."""


@dataclass(frozen=True)
class Extend:
    """Adds the pieces of one sentencepiece model to another, whose ids stay, and tells how to resize the embedding."""

    base: Path
    """tokenizer.model of the language model."""
    extra: Path
    """tokenizer.model with the pieces to add."""
    out: Path
    """Tokenizer folder to write, with embedding_resize.json."""


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Runs one of the two commands."""
    command: Any = tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train")] | Annotated[Extend, tyro.conf.subcommand("extend")],  # type: ignore[arg-type]
        args=argv,
        prog="capgap tokenizer",
    )
    if command.out.exists() and any(command.out.iterdir()):
        raise ConfigError(f"capgap tokenizer: --out ({command.out}) - not empty - choose another folder or remove it")
    make_folder(command.out.parent)
    if isinstance(command, Train):
        train(command)
    else:
        extend(command)
    return 0


def train(command: Train) -> None:
    """Writes tokenizer.model and tokenizer.json trained on the cleaned text; DataError when the text is too small."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(command),
            model_writer=model,
            vocab_size=command.vocab_size,
            model_type=command.model_type,
            character_coverage=command.character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=command.threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"training tokenizer {command.out}: --vocab-size ({command.vocab_size}) - "
            f"{str(error).strip().splitlines()[-1]} - give more text or a smaller vocabulary"
        ) from None
    with replacing_folder(command.out) as folder:
        (folder / "trained.model").write_bytes(model.getvalue())
        save_as_tokenizer(folder / "trained.model", folder)
        (folder / "trained.model").unlink()
    print(f"{command.out}: {command.vocab_size} pieces")


def _lines(command: Train) -> Iterator[str]:
    """Cleaned paragraphs of the sources, as capgap prepare would make them."""
    options = PartOptions(rows="text")
    maker = PartMaker(command.out, options, {}, None, len(command.source))
    read = 0
    limit = command.max_megabytes * 1e6

    def documents() -> Iterator[Document]:
        for number, name in enumerate(command.source):
            for item in read_source(open_source(number, name), options.read, range_bytes=None):
                assert isinstance(item, Document)
                yield item

    with Progress("reading", None, unit="MB", stream=sys.stderr) as progress:
        for _, text in maker.clean_documents(documents(), Accounts()):
            for line in text.split("\n"):
                for start in range(0, len(line), MAX_LINE):
                    yield line[start : start + MAX_LINE]
            progress.advance(len(text) / 1e6)
            read += len(text)
            if read >= limit:
                return


def extend(command: Extend) -> None:
    """Writes the larger model: base pieces keep their ids and scores, new ones follow with lower scores."""
    import sentencepiece

    base, extra = read_model(command.base), read_model(command.extra)
    for path, model in ((command.base, base), (command.extra, extra)):
        if model.trainer_spec.model_type != BPE:
            raise DataError(
                f"extending tokenizer {path}: not a BPE model - scores of unigram models do not mix - give BPE"
            )
    old = sentencepiece.SentencePieceProcessor(model_file=str(command.base))
    known = {piece.piece for piece in base.pieces}
    lowest = min(piece.score for piece in base.pieces if piece.type == NORMAL and piece.score > -1e8)
    added = [piece for piece in extra.pieces if piece.type == NORMAL and piece.piece not in known]
    # sentencepiece merges the best score first. Below all of the base's, the base's text keeps its pieces as far as no
    # new piece joins them, and the order among the new ones is that of the extra model.
    added.sort(key=lambda piece: -piece.score)
    rows = []
    for offset, piece in enumerate(added):
        base.pieces.add(piece=piece.piece, score=lowest - 1 - offset, type=NORMAL)
        shown = piece.piece.replace("\u2581", " ")
        ids = old.encode(shown.removeprefix(" ")) if shown.startswith(" ") else _encode_inside(old, shown)
        rows.append({"id": len(known) + offset, "piece": piece.piece, "mean_of": ids})
    size = len(base.pieces)
    base.trainer_spec.vocab_size = size
    with replacing_folder(command.out) as folder:
        (folder / "extended.model").write_bytes(base.SerializeToString())
        save_as_tokenizer(folder / "extended.model", folder)
        (folder / "extended.model").unlink()
        recipe = {
            "old_vocab_size": len(known),
            "new_vocab_size": size,
            "padded_vocab_size": -(-size // MULTIPLE) * MULTIPLE,
            "how": "resize input and output embeddings to padded_vocab_size; set row `id` to the mean of the old rows "
            "`mean_of`; rows from new_vocab_size on are never used, set them to the mean of all old rows",
            "rows": rows,
        }
        write_json(folder / "embedding_resize.json", recipe)
    print(f"{command.out}: {len(known)} + {len(added)} = {size} pieces, embedding rows {recipe['padded_vocab_size']}")


def _encode_inside(model: Any, text: str) -> list[int]:
    """The ids of a piece that does not begin a word: what follows the ids of a word it could follow."""
    before = model.encode("\n")
    return model.encode("\n" + text)[len(before) :]


if __name__ == "__main__":
    sys.exit(main())
