"""Builds tiny causal language models, packed shards and recipes with the same code that users run."""

from pathlib import Path
from typing import Any

import numpy as np

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

WORDS = ["<pad>", "<unk>", "<s>", "</s>", *(f"word{number}" for number in range(97))]
PAD, BOS, EOS = 0, 2, 3
LENGTH = 24

SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def decoder_config(kind: str, **changes: Any) -> Any:
    """A config of about 30,000 parameters: llama, mistral, qwen2, qwen3, mixtral or qwen3_moe."""
    import transformers

    own: dict[str, dict[str, Any]] = {
        "llama": {},
        "mistral": {"sliding_window": 5},
        "qwen2": {},
        "qwen3": {"head_dim": 8},
        "mixtral": {"num_local_experts": 4, "sliding_window": None},
        "qwen3_moe": {
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    }
    return transformers.AutoConfig.for_model(kind, **{**SIZES, **own[kind], **changes})


def build_model(kind: str, *, seed: int = 0, **changes: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(decoder_config(kind, **changes)).eval()


def write_decoder(folder: Path, kind: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A model folder with its tokenizer."""
    build_model(kind, seed=seed, **changes).save_pretrained(folder)
    return write_word_tokenizer(folder)


def write_word_tokenizer(folder: Path, words: list[str] | None = None) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(words or WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def write_blocks(folder: Path, *, rows: int = 64, seed: int = 0, words: list[str] | None = None) -> Path:
    """`lm-blocks` rows of short documents, two shards, the last row half empty.

    Each word is followed by one of three, so that there is something to learn.
    """
    words = words or WORDS
    generator = np.random.default_rng(seed)
    followers = np.random.default_rng(0).integers(4, len(words), (len(words), 3))
    tokens: list[int] = []
    while len(tokens) < rows * LENGTH:
        word = int(generator.integers(4, len(words)))
        for _ in range(int(generator.integers(1, 15))):
            tokens.append(word)
            word = int(followers[word, generator.integers(0, 3)])
        tokens.append(EOS)
    input_ids = np.array(tokens[: rows * LENGTH], id_dtype(len(words))).reshape(rows, LENGTH)
    length = np.full(rows, LENGTH)
    length[-1] = LENGTH // 2
    input_ids[-1, LENGTH // 2 :] = PAD
    folder.mkdir(parents=True)
    tokenizer = write_word_tokenizer(folder / "tokenizer", words)
    shards = []
    for index, part in enumerate(np.array_split(np.arange(rows), 2)):
        name = shard_name(index, 2)
        columns = {"input_ids": input_ids[part], "length": length[part].astype(narrowest_unsigned(LENGTH))}
        size, digest = write_shard(folder / name, columns)
        shards.append(Shard(name, len(part), int(length[part].sum()), size, digest))
    write_manifest(
        folder,
        Manifest(
            schema_version=1,
            rows="lm-blocks",
            length=LENGTH,
            num_rows=rows,
            num_tokens=int(length.sum()),
            tokenizer={
                "name": "words",
                "hash": tokenizer_hash(tokenizer),
                "vocab_size": len(words),
                "pad_id": PAD,
                "bos_id": BOS,
                "eos_id": EOS,
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
student: {{architecture: decoder, init_from: {student}}}
loss: {{logit_kl: 0.5, cross_entropy: 0.5, balance: 0.01, router_z: 0.001}}
batch: {{global_size: 16, micro_size: 4}}
optimizer: {{learning_rate: 1e-3}}
engine: {{ds_config: ds_configs/zero1.json, precision: fp32}}
checkpoint: {{every_steps: 2, keep_last: 2}}
log: {{every_steps: 1}}
"""
