"""Writes a student as a Hugging Face folder that loads without this project."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data_prep.files import make_folder, replacing_folder
from pipeline.model_files import for_older_readers
from pipeline.models import configuration_minimoe, modeling_minimoe

AUTO_MAP = {
    "AutoConfig": "configuration_minimoe.MiniMoEConfig",
    "AutoModel": "modeling_minimoe.MiniMoEModel",
    "AutoModelForSequenceClassification": "modeling_minimoe.MiniMoEForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_minimoe.MiniMoEForTokenClassification",
}

DECODER_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}capgap]
---

# {name}

A {kind} {origin} with capgap: {parameters:,} parameters, {active:,} active per token, {tokens:,} training tokens in
rows of {length}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}")
print(tokenizer.decode(model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=20)[0]))
```

```
vllm serve {folder} --max-model-len {length}
```

Recipe: `run.json` of the run.
"""

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


def export_decoder(
    folder: Path, model: PreTrainedModel, state: dict[str, Tensor], tokenizer_folder: Path, facts: dict[str, Any]
) -> None:
    """Writes a causal language model in the layout of its architecture, which transformers and vLLM load as it is.

    Args:
        state: the weights under the names of `model`, written in the precision of the run.
        tokenizer_folder: copied file by file, so that its hash stays the same.
        facts: name, teacher, parameters, active, length, tokens and precision for the model card.
    """
    dtype = torch.bfloat16 if facts["precision"] == "bf16" else torch.float32
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    make_folder(folder.parent)
    with replacing_folder(folder) as written:
        model.save_pretrained(written)
        config = written / "config.json"
        config.write_text(json.dumps(for_older_readers(json.loads(config.read_text())), indent=2) + "\n")
        for file in sorted(tokenizer_folder.iterdir()):
            if file.is_file():
                shutil.copyfile(file, written / file.name)
        teacher = facts["teacher"]
        card = DECODER_CARD.format(
            kind=f"{model.config.model_type} decoder",
            origin=f"distilled from `{teacher}`" if teacher else "trained on text",
            tags="distillation, " if teacher else "",
            folder=folder,
            **facts,
        )
        (written / "README.md").write_text(card, encoding="utf-8")
