"""Turns sentencepiece .model files into tokenizer folders that give the same ids, and back to a list of pieces."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import DataError

UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
METASPACE = "\u2581"


def read_model(path: Path) -> Any:
    """The model as sentencepiece's protocol buffer; DataError when the file is not one."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"reading sentencepiece model {path} - no such file - check the path") from None
    except Exception as error:  # protobuf's own error type moves between versions
        raise DataError(
            f"reading sentencepiece model {path}: {error} - damaged or not a model - copy it again"
        ) from None
    if not model.pieces:
        raise DataError(f"reading sentencepiece model {path}: no pieces - damaged or not a model - copy it again")
    return model


def save_as_tokenizer(model_file: Path, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the model itself; AutoTokenizer loads the folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from tokenizers.processors import TemplateProcessing

    model = read_model(model_file)
    spec = model.normalizer_spec
    if model.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise DataError(f"reading sentencepiece model {model_file}: word or char model - only BPE and unigram are read")
    if model.trainer_spec.treat_whitespace_as_suffix:
        raise DataError(f"reading sentencepiece model {model_file}: spaces as suffixes - only prefixes are read")
    pieces = list(model.pieces)
    unknown = next((index for index, piece in enumerate(pieces) if piece.type == UNKNOWN), None)
    byte_fallback = any(piece.type == BYTE for piece in pieces)
    tokenizer = Tokenizer(
        models.BPE(
            {piece.piece: index for index, piece in enumerate(pieces)},
            bpe_merges(pieces),
            unk_token=pieces[unknown].piece if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
        if model.trainer_spec.model_type == BPE
        else models.Unigram([(piece.piece, piece.score) for piece in pieces], unknown, byte_fallback)
    )
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        from tokenizers import Regex

        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(METASPACE))
    steps.append(normalizers.Replace(" ", METASPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for special, kind in ((True, (CONTROL, UNKNOWN)), (False, (USER_DEFINED,))):
        chosen = [AddedToken(p.piece, normalized=False, special=special) for p in pieces if p.type in kind]
        if chosen:
            tokenizer.add_special_tokens(chosen) if special else tokenizer.add_tokens(chosen)
    spec_ids = model.trainer_spec
    roles = (("bos", spec_ids.bos_id), ("eos", spec_ids.eos_id), ("pad", spec_ids.pad_id), ("unk", unknown))
    names = {
        f"{role}_token": pieces[index].piece
        for role, index in roles
        if index is not None and 0 <= index < len(pieces) and pieces[index].type in (CONTROL, UNKNOWN)
    }
    if "bos_token" in names:
        bos = names["bos_token"]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, spec_ids.bos_id)],
        )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(model_file.read_bytes())


def bpe_merges(pieces: Sequence[Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model in the order in which sentencepiece prefers them: by the score of what they make.

    (By id, as converters often do, is wrong for models whose pieces of spaces come first and score last.)
    """
    index_of = {piece.piece: index for index, piece in enumerate(pieces) if piece.type in (NORMAL, USER_DEFINED)}
    ranked = sorted((p for p in pieces if p.type == NORMAL), key=lambda piece: (-piece.score, index_of[piece.piece]))
    merges = []
    for piece in ranked:
        splits = [(piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece))]
        known = [split for split in splits if split[0] in index_of and split[1] in index_of]
        merges += sorted(known, key=lambda split: (index_of[split[0]], index_of[split[1]]))
    return merges
