"""Reads a safetensors model folder tensor by tensor and writes one piece by piece, so that no model is held as a whole.

A conversion writes `OUT.partial/` first: config.json, one safetensors file per piece, and a record of what it was made
from. A second run of the same command skips the pieces that are there with the recorded hash. When all are, the index
is written and the folder takes its name.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data_prep.errors import ConfigError, DataError
from data_prep.files import (
    content_hash,
    file_hash,
    make_folder,
    read_json,
    rename,
    require_free_space,
    write_bytes,
    write_json,
)
from data_prep.model_folders import check_weights, read_model_config
from data_prep.progress import Progress
from pipeline.state_files import write_tensors

RECORD = "conversion.json"
PARTIAL = ".partial"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


class ModelFiles(Mapping[str, Tensor]):
    """The tensors of a model folder by their name on disk, read when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_model_config(folder)
        self._where: dict[str, Path] = {}
        for path in check_weights(folder):
            try:
                with safe_open(path, "pt") as file:
                    self._where |= dict.fromkeys(file.keys(), path)
            except Exception as error:  # safetensors raises its own kind, which it does not export by a stable name
                raise DataError(f"reading {path}: {error} - damaged file - copy or download it again") from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._where:
            raise DataError(
                f"model weight missing: {name} in {self.folder} - the file is of another architecture, or cut - "
                "give the folder of a LLaMA-, Mistral- or Qwen-like causal LM"
            )
        with safe_open(self._where[name], "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of one layer, named from `self_attn.` or `mlp.` on."""
        prefix = f"model.layers.{index}."
        return {name.removeprefix(prefix): self[name] for name in self if name.startswith(prefix)}

    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in set(self._where.values()))

    def fingerprint(self) -> str:
        """A hash of config, names and sizes: enough to tell that a conversion goes on from the same source."""
        sizes = sorted((path.name, path.stat().st_size) for path in set(self._where.values()))
        return content_hash(json.dumps([self.config, sizes], sort_keys=True).encode())


Pieces = Mapping[str, Callable[[], dict[str, Tensor]]]


def write_model(
    out: Path,
    config: dict[str, Any],
    pieces: Pieces,
    *,
    label: str,
    made_from: dict[str, Any],
    tokenizer_folder: Path,
    card: str,
    num_bytes: int,
) -> None:
    """Writes a model folder from pieces that are computed one after the other.

    Args:
        pieces: by name, what computes the tensors of a piece under their names on disk.
        made_from: source fingerprint and settings; a folder that was begun with others is refused.
        num_bytes: of all weights, for the check of the free disk.

    Raises:
        ConfigError: when `out` is another folder's or was begun by another command.
    """
    partial = out.with_name(out.name + PARTIAL)
    if is_written(out, made_from):
        return
    make_folder(partial)
    begun = partial / RECORD
    if begun.exists() and read_json(begun, f"remove {partial}")["made_from"] != made_from:
        raise ConfigError(f"out: {partial} was begun by another command - remove it, or choose another --out")
    files: dict[str, dict[str, Any]] = read_json(begun, "").get("files", {}) if begun.exists() else {}
    require_free_space(
        partial, num_bytes - sum((partial / name).stat().st_size for name in files if (partial / name).exists())
    )
    count = len(pieces)
    with Progress(label, count, unit="pieces") as progress:
        for number, (piece, compute) in enumerate(pieces.items(), 1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            path = partial / name
            if name not in files or not path.is_file() or file_hash(path) != files[name]["hash"]:
                tensors = compute()
                digest = write_tensors(path, tensors, {"format": "pt"})
                sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
                files[name] = {"hash": digest, "sizes": sizes}
                write_json(begun, {"made_from": made_from, "files": files})
                del tensors
            progress.advance(note=piece)
    index = {
        "metadata": {"total_size": sum(sum(entry["sizes"].values()) for entry in files.values())},
        "weight_map": {key: name for name in sorted(files) for key in files[name]["sizes"]},
    }
    write_json(partial / "model.safetensors.index.json", index)
    write_json(partial / "config.json", for_older_readers(config))
    for name in TOKENIZER_FILES:
        if (tokenizer_folder / name).is_file():
            write_bytes(partial / name, (tokenizer_folder / name).read_bytes())
    write_bytes(partial / "README.md", card.encode())
    rename(partial, out)


def is_written(out: Path, made_from: dict[str, Any]) -> bool:
    """Whether `out` holds the finished result of the same command; ConfigError when it holds something else."""
    if not out.exists():
        return False
    record = out / RECORD
    if record.is_file() and read_json(record, "choose another --out")["made_from"] == made_from:
        return True
    raise ConfigError(f"out: {out} exists and was not written by this command - choose another --out, or remove it")


def for_older_readers(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 that says the rotary base in transformers 4's places, too.

    Readers that stand on transformers 4 (vLLM among them, its issue 42624) know no rope_parameters and would take the
    architecture's default without a word: for a Mixtral that is not the base of a LLaMA.
    """
    rope = config.get("rope_parameters") or {}
    older: dict[str, Any] = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    return config | older


def config_of(folder: Path) -> Any:
    """The transformers config of a dense causal LM, with every default filled in."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def dtype_bytes(config: Any) -> int:
    """Bytes per weight in the dtype that the config names."""
    dtype = getattr(config, "dtype", None) or torch.float32
    return torch.empty(0, dtype=dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype))).element_size()


def size_of(config: Any) -> str:
    """Parameters, those that a token meets, and bytes of the model that a transformers config describes."""
    from transformers import AutoModelForCausalLM

    from pipeline.models.sizes import num_active_parameters, num_parameters

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count, active = num_parameters(model), num_active_parameters(model)
    chosen = "" if active == count else f" ({active:,} active)"
    return f"{count:,} parameters{chosen}, {count * dtype_bytes(config) / 1e9:.2f} GB"
