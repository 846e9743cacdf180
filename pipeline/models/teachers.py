"""Loads frozen teachers and turns a batch into their Signals."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel

from pipeline.config import TeacherConfig
from pipeline.models.bert import cut_after, last_layer_relations
from pipeline.signals import Batch, Signals


class RelationTeacher(nn.Module):
    """A BERT-family encoder that stops at the queries, keys and values of the layer that is imitated."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Signals:
        return Signals(valid_BT=batch.valid_BT, relations=last_layer_relations(self.encoder, batch))


def load_teacher(folder: Path, config: TeacherConfig, *, dtype: torch.dtype) -> RelationTeacher:
    """The frozen teacher of a checked model folder, cut after its relation layer."""
    encoder = AutoModel.from_pretrained(
        folder, dtype=dtype, trust_remote_code=config.trust_remote_code, use_safetensors=True
    )
    return RelationTeacher(cut_after(encoder, config.relation_layer))
