"""MiniMoE, a BERT encoder with minimal experts (arXiv 2305.12129), in plain PyTorch and transformers.

This file is copied as it is into every exported folder, so that the model loads with `trust_remote_code=True` on a
machine that has never heard of capgap. It therefore imports nothing of ours.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput

from .configuration_minimoe import MiniMoEConfig

# B rows, T tokens of a row, D hidden width, N = B*T tokens, E experts, F width of an expert


@dataclass
class MiniMoEModelOutput(BaseModelOutput):
    """Hidden states, and one entry per router in the order of the layers (attention before feed-forward)."""

    router_logits: tuple | None = None


class MiniMoEEmbeddings(nn.Module):
    """Word, position and segment embeddings, summed and normalised."""

    def __init__(self, config: MiniMoEConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, token_type_ids, position_ids, inputs_embeds):
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        summed = words + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return self.dropout(self.norm(summed))


def router_logits(gate: nn.Linear, hidden_ND: Tensor) -> Tensor:
    """Router logits [N, E] in float32: a bf16 router sends close calls to the wrong expert."""
    dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    with torch.autocast(hidden_ND.device.type, enabled=False):
        return F.linear(hidden_ND.to(dtype), gate.weight.to(dtype), gate.bias.to(dtype))


def choose_expert(gate: nn.Linear, hidden_ND: Tensor, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Top-1 routing: the expert [N] of each token, its gate [N], and the router logits [N, E].

    The bias steers the choice and never the gate (arXiv 2408.15664).
    """
    logits_NE = router_logits(gate, hidden_ND)
    scores_NE = logits_NE.softmax(-1)
    expert_N = (logits_NE if bias_E is None else scores_NE + bias_E.to(scores_NE.dtype)).argmax(-1)
    gate_N = scores_NE.gather(1, expert_N.unsqueeze(-1)).squeeze(-1)
    return expert_N, gate_N.to(hidden_ND.dtype), logits_NE


def selection_bias(config: MiniMoEConfig, num_experts: int) -> Tensor | None:
    """The bias [E] of a new router, where the config wants one; training moves it."""
    return torch.zeros(num_experts, dtype=torch.float32) if config.selection_bias else None


def expert_linear(input_NI: Tensor, expert_N: Tensor, weight_EOI: Tensor, bias_EO: Tensor) -> Tensor:
    """Applies to each token the linear map of its expert: [N, I] -> [N, O]."""
    output_NO = input_NI.new_empty(input_NI.shape[0], weight_EOI.shape[1])
    for expert in range(weight_EOI.shape[0]):
        rows = (expert_N == expert).nonzero().squeeze(-1)
        mapped = F.linear(input_NI[rows], weight_EOI[expert], bias_EO[expert])
        output_NO = output_NO.index_copy(0, rows, mapped.to(output_NO.dtype))
    return output_NO


class MiniMoEAttention(nn.Module):
    """Multi-head self-attention; with several attention experts, each token uses one expert's four linear maps."""

    selection_bias: Tensor | None

    def __init__(self, config: MiniMoEConfig):
        super().__init__()
        hidden, experts = config.hidden_size, config.num_attention_experts
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.gate = None
        if experts == 1:
            self.query = nn.Linear(hidden, hidden)
            self.key = nn.Linear(hidden, hidden)
            self.value = nn.Linear(hidden, hidden)
            self.output = nn.Linear(hidden, hidden)
        else:
            self.gate = nn.Linear(hidden, experts)
            self.register_buffer("selection_bias", selection_bias(config, experts))
            self.qkv_weight = nn.Parameter(torch.empty(experts, 3 * hidden, hidden))
            self.qkv_bias = nn.Parameter(torch.zeros(experts, 3 * hidden))
            self.output_weight = nn.Parameter(torch.empty(experts, hidden, hidden))
            self.output_bias = nn.Parameter(torch.zeros(experts, hidden))

    def choose(self, hidden_ND: Tensor, valid_N: Tensor):
        """Expert [N], gate [N] and what is reported of the router."""
        return choose_expert(self.gate, hidden_ND, self.selection_bias)

    def attend(self, query, key, value, valid_BT):
        def heads(states):
            return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        context = F.scaled_dot_product_attention(
            heads(query),
            heads(key),
            heads(value),
            attn_mask=valid_BT[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return context.transpose(1, 2).flatten(2)

    def forward(self, hidden_BTD: Tensor, valid_BT: Tensor):
        if self.gate is None:
            query, key, value = self.query(hidden_BTD), self.key(hidden_BTD), self.value(hidden_BTD)
            return self.output(self.attend(query, key, value, valid_BT)), None
        shape, hidden_ND = hidden_BTD.shape, hidden_BTD.flatten(0, 1)
        expert_N, gate_N, router = self.choose(hidden_ND, valid_BT.flatten())
        qkv = expert_linear(hidden_ND, expert_N, self.qkv_weight, self.qkv_bias).unflatten(0, shape[:2])
        context_ND = self.attend(*qkv.chunk(3, -1), valid_BT).flatten(0, 1)
        output_ND = expert_linear(context_ND, expert_N, self.output_weight, self.output_bias)
        return (gate_N.unsqueeze(-1) * output_ND).view(shape), router


class MiniMoEExperts(nn.Module):
    """Two-layer GELU experts of full width; `w3` packs both biases so that an expert is three tensors."""

    def __init__(self, config: MiniMoEConfig):
        super().__init__()
        experts, hidden, ffn = config.num_experts, config.hidden_size, config.intermediate_size
        self.w1 = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, ffn))
        self.w3 = nn.Parameter(torch.zeros(experts, 1, ffn + hidden))

    def biases(self) -> tuple[Tensor, Tensor]:
        """The biases [E, F] and [E, D] of the two layers."""
        ffn = self.w1.shape[1]
        return self.w3[:, 0, :ffn], self.w3[:, 0, ffn:]

    def forward(self, hidden_ND: Tensor, expert_N: Tensor, gate_N: Tensor, valid_N: Tensor) -> Tensor:
        b1_EF, b2_ED = self.biases()
        output_ND = torch.zeros_like(hidden_ND)
        for expert in range(self.w1.shape[0]):
            rows = ((expert_N == expert) & valid_N).nonzero().squeeze(-1)
            inner = F.gelu(F.linear(hidden_ND[rows], self.w1[expert], b1_EF[expert]))
            mapped = gate_N[rows].unsqueeze(-1) * F.linear(inner, self.w2[expert], b2_ED[expert])
            output_ND = output_ND.index_copy(0, rows, mapped.to(output_ND.dtype))
        return output_ND


class MiniMoEFeedForward(nn.Module):
    """A linear gate and the experts; the chosen expert's output is scaled by its gate. Padding gets zeros."""

    selection_bias: Tensor | None

    def __init__(self, config: MiniMoEConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts)
        self.register_buffer("selection_bias", selection_bias(config, config.num_experts))
        self.experts = MiniMoEExperts(config)

    def forward(self, hidden_BTD: Tensor, valid_BT: Tensor):
        hidden_ND, valid_N = hidden_BTD.flatten(0, 1), valid_BT.flatten()
        expert_N, gate_N, router = choose_expert(self.gate, hidden_ND, self.selection_bias)
        return self.experts(hidden_ND, expert_N, gate_N, valid_N).view(hidden_BTD.shape), router


class MiniMoELayer(GradientCheckpointingLayer):
    """A post-norm BERT block."""

    attention_class = MiniMoEAttention
    feed_forward_class = MiniMoEFeedForward

    def __init__(self, config: MiniMoEConfig):
        super().__init__()
        self.attention = self.attention_class(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.moe = self.feed_forward_class(config)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_BTD: Tensor, valid_BT: Tensor):
        attended, attention_router = self.attention(hidden_BTD, valid_BT)
        hidden_BTD = self.attention_norm(hidden_BTD + self.dropout(attended))
        mixed, router = self.moe(hidden_BTD, valid_BT)
        return self.output_norm(hidden_BTD + self.dropout(mixed)), attention_router, router


class MiniMoEPreTrainedModel(PreTrainedModel):
    config_class = MiniMoEConfig
    base_model_prefix = "minimoe"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["MiniMoELayer"]
    # Rounded to bf16 it would send close calls elsewhere.
    _keep_in_fp32_modules_strict = ["selection_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # torch.nn.init is what transformers guards while it loads: weights from the file are not drawn again.
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, MiniMoEExperts):
            nn.init.normal_(module.w1, std=std)
            nn.init.normal_(module.w2, std=std)
            nn.init.zeros_(module.w3)
        elif isinstance(module, MiniMoEAttention) and module.gate is not None:
            nn.init.normal_(module.qkv_weight, std=std)
            nn.init.normal_(module.output_weight, std=std)
            nn.init.zeros_(module.qkv_bias)
            nn.init.zeros_(module.output_bias)


class MiniMoEModel(MiniMoEPreTrainedModel):
    """The encoder: token ids to hidden states."""

    layer_class = MiniMoELayer

    def __init__(self, config: MiniMoEConfig):
        super().__init__(config)
        self.embeddings = MiniMoEEmbeddings(config)
        self.layers = nn.ModuleList(self.layer_class(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        source = input_ids if inputs_embeds is None else inputs_embeds
        if source is None:
            raise ValueError("give input_ids or inputs_embeds")
        shape, device = source.shape[:2], source.device
        valid_BT = (
            torch.ones(shape, dtype=torch.bool, device=device) if attention_mask is None else attention_mask.bool()
        )
        if token_type_ids is None:
            token_type_ids = torch.zeros(shape, dtype=torch.long, device=device)
        if position_ids is None:
            position_ids = torch.arange(shape[1], device=device).unsqueeze(0)

        hidden_BTD = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        all_hidden_states, routers = [hidden_BTD], []
        for layer in self.layers:
            hidden_BTD, *layer_routers = layer(hidden_BTD, valid_BT)
            all_hidden_states.append(hidden_BTD)
            routers += [router for router in layer_routers if router is not None]
        output = MiniMoEModelOutput(
            last_hidden_state=hidden_BTD,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            router_logits=tuple(routers),
        )
        return output if return_dict is not False else output.to_tuple()


class MiniMoEForSequenceClassification(MiniMoEPreTrainedModel):
    """The encoder with BERT's head on the first token: one score per label, or one number for regression."""

    def __init__(self, config: MiniMoEConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.minimoe = MiniMoEModel(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, return_dict=None, **kwargs
    ):
        encoded = self.minimoe(input_ids, attention_mask, token_type_ids, **kwargs)
        pooled = torch.tanh(self.pooler(encoded.last_hidden_state[:, 0]))
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            if self.num_labels == 1:
                loss = F.mse_loss(logits.squeeze(-1).float(), labels.float())
            else:
                loss = F.cross_entropy(logits.float(), labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output if return_dict is not False else output.to_tuple()


class MiniMoEForTokenClassification(MiniMoEPreTrainedModel):
    """The encoder with one score per label and token; tokens labelled -100 do not count."""

    def __init__(self, config: MiniMoEConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.minimoe = MiniMoEModel(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids=None, attention_mask=None, token_type_ids=None, labels=None, return_dict=None, **kwargs
    ):
        encoded = self.minimoe(input_ids, attention_mask, token_type_ids, **kwargs)
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        output = TokenClassifierOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)
        return output if return_dict is not False else output.to_tuple()


def _classifier_dropout(config: MiniMoEConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
