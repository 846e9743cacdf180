"""Writes a student as a Hugging Face folder that loads without this project."""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from data_prep.files import make_folder, replacing_folder
from pipeline.models import configuration_minimoe, modeling_minimoe

AUTO_MAP = {
    "AutoConfig": "configuration_minimoe.MiniMoEConfig",
    "AutoModel": "modeling_minimoe.MiniMoEModel",
    "AutoModelForSequenceClassification": "modeling_minimoe.MiniMoEForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_minimoe.MiniMoEForTokenClassification",
}

CARD = """---
library_name: transformers
tags: [distillation, mixture-of-experts, capgap]
---

# {name}

{kind} distilled from `{teacher}` with capgap: {parameters:,} parameters, {macs:.3f} G multiply-accumulates in linear
layers per {length} tokens, {tokens:,} training tokens.

```python
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{folder}"{trust})
model = AutoModel.from_pretrained("{folder}"{trust})
```
{note}
Recipe: `run.json` of the run. Method: MiniLMv2 relation distillation (arXiv 2012.15828){method}.
"""


def export_student(
    folder: Path, model: PreTrainedModel, state: dict[str, Tensor], tokenizer_folder: Path, facts: dict[str, Any]
) -> None:
    """Writes weights (safetensors, float32), config, tokenizer, model card and, for MiniMoE, its own code.

    Args:
        state: the weights under the names of `model`.
        tokenizer_folder: copied file by file, so that its hash stays the same.
        facts: name, teacher, parameters, macs, length and tokens for the model card.
    """
    model.load_state_dict(state)
    is_minimoe = model.config.model_type == "minimoe"
    if is_minimoe:
        model.config.auto_map = AUTO_MAP
    # A distillation may run without dropout; whoever fine-tunes the student expects BERT's.
    model.config.update({"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1})
    make_folder(folder.parent)
    with replacing_folder(folder) as written:
        model.save_pretrained(written)
        if is_minimoe:
            for module in (configuration_minimoe, modeling_minimoe):
                assert module.__file__ is not None
                shutil.copyfile(module.__file__, written / Path(module.__file__).name)
        for file in sorted(tokenizer_folder.iterdir()):
            if file.is_file():
                shutil.copyfile(file, written / file.name)
        card = CARD.format(
            kind="A mixture of minimal experts" if is_minimoe else "A dense encoder",
            folder=folder,
            trust=", trust_remote_code=True" if is_minimoe else "",
            note="\nThe model code lies in this folder; read it before you trust it.\n" if is_minimoe else "",
            method=", MiniMoE (arXiv 2305.12129)" if is_minimoe else "",
            **facts,
        )
        (written / "README.md").write_text(card, encoding="utf-8")
