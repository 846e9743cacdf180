"""Builds tiny teachers, tokenizers, shard folders and a recipe with the same code that users run."""

from pathlib import Path

import numpy as np

from data_prep.files import write_json
from data_prep.shards import (
    Manifest,
    Shard,
    id_dtype,
    narrowest_unsigned,
    shard_name,
    tokenizer_hash,
    write_manifest,
    write_shard,
)

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(195))]
LENGTH = 16


def write_tokenizer(folder: Path, vocabulary: list[str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary or VOCABULARY) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    return folder


def write_teacher(folder: Path, *, layers: int = 3, hidden: int = 32, seed: int = 0, **changes) -> Path:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=64,
        initializer_range=0.2,
        **changes,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return write_tokenizer(folder)


def write_rows(folder: Path, *, rows: int = 96, seed: int = 0, vocabulary: list[str] | None = None) -> Path:
    """`bert-pairs` rows of words drawn at random, two shards, some padded to the last token but three."""
    generator = np.random.default_rng(seed)
    vocabulary = vocabulary or VOCABULARY
    input_ids = np.zeros((rows, LENGTH), dtype=id_dtype(len(vocabulary)))
    length = generator.integers(4, LENGTH + 1, rows)
    length[::2] = LENGTH
    boundary = np.maximum(2, length // 2)
    for row in range(rows):
        input_ids[row, : length[row]] = generator.integers(5, len(vocabulary), length[row])
        input_ids[row, 0], input_ids[row, boundary[row] - 1], input_ids[row, length[row] - 1] = 2, 3, 3
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder / "tokenizer", vocabulary)
    narrow = narrowest_unsigned(LENGTH)
    shards = []
    for index, part in enumerate(np.array_split(np.arange(rows), 2)):
        columns = {
            "input_ids": input_ids[part],
            "length": length[part].astype(narrow),
            "segment_boundary": boundary[part].astype(narrow),
        }
        name = shard_name(index, 2)
        size, digest = write_shard(folder / name, columns)
        shards.append(Shard(name, len(part), int(length[part].sum()), size, digest))
    write_manifest(
        folder,
        Manifest(
            schema_version=1,
            rows="bert-pairs",
            length=LENGTH,
            num_rows=rows,
            num_tokens=int(length.sum()),
            tokenizer={
                "name": "words",
                "hash": tokenizer_hash(tokenizer),
                "vocab_size": len(vocabulary),
                "pad_id": 0,
                "cls_id": 2,
                "sep_id": 3,
            },
            sources=[],
            shards=shards,
            utilisation=float(length.sum() / (rows * LENGTH)),
        ),
    )
    return folder


RECIPE = """
out: {out}
steps: 6
data: {{shards: {shards}}}
teacher: {{model: {teacher}}}
student:
  {{architecture: minimoe, num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 4, intermediate_size: 64,
   num_experts: 4, router_jitter: 0.1, dropout: 0.1, selection_bias_rate: 0.02}}
loss: {{num_relation_heads: 4}}
batch: {{global_size: 16, micro_size: 4}}
optimizer: {{learning_rate: 1e-3}}
engine: {{ds_config: ds_configs/zero1.json, precision: fp32}}
checkpoint: {{every_steps: 2, keep_last: 2}}
log: {{every_steps: 1}}
"""
