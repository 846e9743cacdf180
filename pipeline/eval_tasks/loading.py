"""Loads the model under test and its tokenizer, refusing what would score silently wrong.

torch is imported when a model is: a refusal, or a command with nothing left to do, takes a second.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from data_prep.errors import CheckpointError, ConfigError
from data_prep.model_folders import find_model_folder, keep_code_out_of_home, read_model_config

if TYPE_CHECKING:
    import torch
    from torch import nn

DROPOUT_KEYS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
HASHED_SUFFIXES = (".json", ".safetensors", ".py", ".txt", ".model")


@dataclass(frozen=True)
class ModelSource:
    """A model folder, and whether its own code may run."""

    folder: Path
    trust_remote_code: bool = False

    @staticmethod
    def find(name: str, *, trust_remote_code: bool) -> "ModelSource":
        """The model behind a folder, hub name or package:NAME.

        Raises DataError when a file is missing, ConfigError when it brings Python code that was not allowed to run.
        """
        folder = find_model_folder(name)
        if "auto_map" in read_model_config(folder) and not trust_remote_code:
            raise ConfigError(
                f"cannot load model: {folder} (auto_map of its config.json) - it runs Python code of its own - "
                "read its .py files, then pass --trust-remote-code"
            )
        if trust_remote_code:
            keep_code_out_of_home()
        return ModelSource(folder, trust_remote_code)

    @property
    def num_positions(self) -> int | None:
        """The longest row the model was made for; None when its config does not say."""
        return read_model_config(self.folder).get("max_position_embeddings")

    def dropout(self, probability: float) -> dict[str, float]:
        """The options of `model` that set dropout, under the names that this model's config has for it."""
        config = read_model_config(self.folder)
        return {key: probability for key in DROPOUT_KEYS if key in config}

    def fingerprint(self) -> str:
        """xxh3_128 over weights, configuration, tokenizer and code of the folder."""
        digest = xxhash.xxh3_128()
        for path in sorted(self.folder.iterdir()):
            if path.suffix in HASHED_SUFFIXES and path.is_file():
                digest.update(path.name.encode())
                with path.open("rb") as stream:
                    while block := stream.read(1 << 24):
                        digest.update(block)
        return digest.hexdigest()

    def tokenizer(self, **options: Any) -> Any:
        """The fast tokenizer of the model, with a padding token."""
        from transformers import AutoTokenizer

        tokenizer = self._load(AutoTokenizer, **options)
        if not tokenizer.is_fast:
            raise CheckpointError(
                f"cannot load tokenizer: {self.folder} - it has no tokenizer.json - "
                "save a fast tokenizer beside the model"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def model(
        self,
        auto_class: Any,
        *,
        device: "torch.device",
        dtype: "torch.dtype | None" = None,
        head_is_new: bool = True,
        **options: Any,
    ) -> "nn.Module":
        """The model on `device`, in fp32 unless told.

        Raises CheckpointError when weights are missing that are not those of a new head or pooler.
        """
        import torch

        model, info = self._load(
            auto_class, dtype=dtype or torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
        prefix = f"{model.base_model_prefix}."
        missing = [key for key in info["missing_keys"] if "pooler" not in key]
        # A base model's own keys have no prefix; a model with a head has a new head outside the prefix.
        is_base = not any(name.startswith(prefix) for name, _ in model.named_parameters())
        lost = sorted(key for key in missing if is_base or not head_is_new or key.startswith(prefix))
        if lost:
            raise CheckpointError(
                f"cannot load model: {self.folder} ({lost[0]}, {len(lost)} tensors in all) - "
                "weights are missing and would start random - export the model again"
            )
        return model.to(device)

    def _load(self, auto_class: Any, **options: Any) -> Any:
        try:
            return auto_class.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code, **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"cannot load model: {self.folder} - {reason} - check that the folder is whole, or export it again"
            ) from error


def encoder_figures(model: "nn.Module", length: int) -> dict[str, int | None]:
    """Parameters without pooler, and linear multiply-accumulates per sequence, of a base model.

    The latter are None when weight matrices stand outside nn.Linear and nn.Embedding: how many experts are active per
    token is then known only to the run that trained the model (its run.json says it).
    """
    from torch import nn

    from pipeline.models.sizes import linear_macs, num_parameters

    encoder = nn.ModuleDict({name: child for name, child in model.named_children() if name != "pooler"})
    has_other_matrices = any(
        parameter.ndim > 1
        for module in encoder.modules()
        if not isinstance(module, nn.Linear | nn.Embedding)
        for parameter in module.parameters(recurse=False)
    )
    return {
        "parameters": num_parameters(encoder),
        "linear_macs_per_sequence": None if has_other_matrices else linear_macs(encoder, length),
        "sequence_length": length,
    }
