"""Reads the attention relations of a BERT-family encoder, for teachers and for dense students alike."""

from torch import Tensor, nn

from data_prep.errors import ConfigError
from pipeline.signals import Batch


def cut_after(model: nn.Module, relation_layer: int) -> nn.Module:
    """Drops the layers above `relation_layer` (negative counts from the end), which no relation depends on.

    Raises ConfigError when the layer does not exist or the model is no BERT-family encoder.
    """
    layers = getattr(getattr(model, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(layers[0], "attention"):
        raise ConfigError(
            f"teacher.model: {type(model).__name__} has no encoder.layer[i].attention - relations are read from "
            "BERT-family encoders (BERT, RoBERTa, ELECTRA, MiniLM) - choose such a teacher"
        )
    index = relation_layer if relation_layer >= 0 else len(layers) + relation_layer
    if not 0 <= index < len(layers):
        raise ConfigError(
            f"teacher.relation_layer ({relation_layer}) does not exist - the model has {len(layers)} layers - "
            f"choose -{len(layers)} to {len(layers) - 1}"
        )
    model.encoder.layer = layers[: index + 1]
    return model


def last_layer_relations(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, T, D] of the last layer's attention.

    Only what they depend on is run: the last layer's own attention and feed-forward are not.
    """
    layers = model.encoder.layer
    model.encoder.layer = layers[:-1]
    try:
        segments = model.config.type_vocab_size
        hidden_states_BTD = model(
            input_ids=batch.input_ids,
            attention_mask=batch.valid_BT,
            # RoBERTa knows one segment only.
            token_type_ids=batch.token_type_ids.clamp(max=segments - 1),
        ).last_hidden_state
    finally:
        model.encoder.layer = layers
    attention = layers[-1].attention.self
    return attention.query(hidden_states_BTD), attention.key(hidden_states_BTD), attention.value(hidden_states_BTD)
