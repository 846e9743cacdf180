"""Students in training: a dense BERT and MiniMoE, each turning a batch into Signals."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel

from capgap_kernels import Routing, expert_mlp, route, router_logits
from pipeline.config import StudentConfig
from pipeline.models.bert import last_layer_relations
from pipeline.models.initialization import copy_bert_layers, fill_minimoe, spread_layers
from pipeline.models.modeling_minimoe import (
    MiniMoEAttention,
    MiniMoEConfig,
    MiniMoEFeedForward,
    MiniMoELayer,
    MiniMoEModel,
)
from pipeline.signals import Batch, RouterSignals, Signals

# B rows, T tokens of a row, D hidden width, N = B*T tokens, E experts


class DenseStudent(nn.Module):
    """A BertModel whose relations are those of its last attention (MiniLMv2, arXiv 2012.15828).

    Nothing above the last layer's queries, keys and values is reached by the loss, so it is frozen: it would only
    decay.
    """

    def __init__(self, backbone: BertModel):
        super().__init__()
        self.backbone = backbone
        last = backbone.encoder.layer[-1]
        for module in (last.attention.output, last.intermediate, last.output):
            module.requires_grad_(False)

    def forward(self, batch: Batch) -> Signals:
        return Signals(valid_BT=batch.valid_BT, relations=last_layer_relations(self.backbone, batch))

    def served_model(self) -> PreTrainedModel:
        """What users load: a plain BertModel, to be filled with the trained weights."""
        return BertModel(self.backbone.config, add_pooling_layer=False)


def routed(
    gate: nn.Linear, bias_E: Tensor | None, hidden_ND: Tensor, valid_N: Tensor, jitter: float
) -> tuple[Routing, RouterSignals]:
    """Top-1 routing of the valid tokens, with the sums that router losses need."""
    logits_NE = router_logits(hidden_ND, gate.weight, gate.bias)
    if jitter and gate.training:
        logits_NE = logits_NE + torch.empty_like(logits_NE).uniform_(-jitter, jitter)
    routing = route(logits_NE, top_k=1, selection_bias_E=bias_E, valid_N=valid_N)
    return routing, RouterSignals(
        routing.gate_sum_E, routing.tokens_per_expert_E, routing.z_loss_sum, routing.entropy_sum
    )


class RoutedAttention(MiniMoEAttention):
    """Attention whose router, if it has one, reports RouterSignals."""

    router_jitter = 0.0

    def choose(self, hidden_ND: Tensor, valid_N: Tensor):
        assert self.gate is not None
        routing, signals = routed(self.gate, self.selection_bias, hidden_ND, valid_N, self.router_jitter)
        return routing.expert_NK[:, 0], routing.gate_NK[:, 0].to(hidden_ND.dtype), signals


class RoutedFeedForward(MiniMoEFeedForward):
    """The expert layer on our kernels, reporting RouterSignals."""

    router_jitter = 0.0

    def forward(self, hidden_BTD: Tensor, valid_BT: Tensor):
        hidden_ND = hidden_BTD.flatten(0, 1)
        routing, signals = routed(self.gate, self.selection_bias, hidden_ND, valid_BT.flatten(), self.router_jitter)
        b1_EF, b2_ED = self.experts.biases()
        output_ND = expert_mlp(
            hidden_ND, routing, self.experts.w1, self.experts.w2, b1_EF=b1_EF, b2_ED=b2_ED, activation="gelu"
        )
        return output_ND.view(hidden_BTD.shape), signals


class RoutedLayer(MiniMoELayer):
    attention_class = RoutedAttention
    feed_forward_class = RoutedFeedForward


class RoutedMiniMoE(MiniMoEModel):
    """MiniMoE with the same parameters, run on our kernels."""

    layer_class = RoutedLayer


class RelationHead(nn.Module):
    """Queries, keys and values on the last hidden states, for training only.

    With the relations of the last attention, the experts above it would learn nothing (arXiv 2305.12129).
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query(hidden_states_BTD), self.key(hidden_states_BTD), self.value(hidden_states_BTD)


class MiniMoEStudent(nn.Module):
    """MiniMoE and its relation head."""

    def __init__(self, backbone: RoutedMiniMoE, *, router_jitter: float = 0.0):
        super().__init__()
        self.backbone = backbone
        self.relation_head = RelationHead(backbone.config.hidden_size)
        self.relation_head.apply(backbone._init_weights)
        for module in backbone.modules():
            if isinstance(module, (RoutedAttention, RoutedFeedForward)):
                module.router_jitter = router_jitter
        # In the order in which the layers report them: attention before feed-forward.
        self.router_names = tuple(
            f"layers.{index}.{part}"
            for index, layer in enumerate(backbone.layers)
            for part in (("moe",) if layer.attention.gate is None else ("attention", "moe"))
        )

    def forward(self, batch: Batch) -> Signals:
        encoded = self.backbone(batch.input_ids, batch.valid_BT, batch.token_type_ids)
        return Signals(
            valid_BT=batch.valid_BT,
            hidden_states_BTD=encoded.last_hidden_state,
            relations=self.relation_head(encoded.last_hidden_state),
            routers=dict(zip(self.router_names, encoded.router_logits, strict=True)),
        )

    @torch.no_grad()
    def move_selection_biases(self, loads: dict[str, Tensor], rate: float) -> None:
        """Raises by `rate` the bias of every expert that got less than an even load, and lowers the others' (arXiv
        2408.15664).

        Args:
            loads: by router, the tokens [E] that each expert got in the whole optimizer step, on all ranks.
        """
        for name, load_E in loads.items():
            # Counts of any size are exact in float64.
            missing_E = load_E.double().mean() - load_E
            self.backbone.get_submodule(name).selection_bias.add_(rate * missing_E.sign())

    def served_model(self) -> PreTrainedModel:
        """What users load: the encoder alone, in its plain form, to be filled with the trained weights."""
        config = self.backbone.config
        assert isinstance(config, MiniMoEConfig)
        return MiniMoEModel(config)


def build_student(
    config: StudentConfig, *, teacher_config: dict, init_folder: Path | None, seed: int
) -> DenseStudent | MiniMoEStudent:
    """A student with its first weights; vocabulary, positions and special ids are the teacher's.

    Args:
        teacher_config: the teacher's config.json.
        init_folder: BERT-family folder whose layers are copied; None starts from random weights.
    """
    # The caller's random state stays as it was, so that a resumed run draws what the unbroken run drew.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shared = {
            "vocab_size": teacher_config["vocab_size"],
            "max_position_embeddings": teacher_config.get("max_position_embeddings", 512),
            "type_vocab_size": 2,
            "pad_token_id": teacher_config.get("pad_token_id", 0),
            "layer_norm_eps": teacher_config.get("layer_norm_eps", 1e-12),
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.dropout,
        }
        source = AutoModel.from_pretrained(init_folder, use_safetensors=True) if init_folder else None
        # Experts may be cut out of a wider feed-forward layer than their own.
        wide = source.config.intermediate_size if source is not None else config.intermediate_size
        dense_width = wide if config.architecture == "minimoe" else config.intermediate_size
        dense = BertModel(BertConfig(**shared, intermediate_size=dense_width), add_pooling_layer=False)
        if source is not None:
            layers = config.init_layers or spread_layers(source.config.num_hidden_layers, config.num_hidden_layers)
            copy_bert_layers(dense, source, layers)
        if config.architecture == "dense":
            return DenseStudent(dense)
        backbone = RoutedMiniMoE(
            MiniMoEConfig(
                **shared,
                intermediate_size=config.intermediate_size,
                num_experts=config.num_experts,
                num_attention_experts=config.num_attention_experts,
                selection_bias=config.selection_bias_rate > 0,
            )
        )
        fill_minimoe(backbone, dense, config, torch.Generator().manual_seed(seed))
        return MiniMoEStudent(backbone, router_jitter=config.router_jitter)
