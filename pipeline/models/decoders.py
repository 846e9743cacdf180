"""Decoders in training: students and teachers turn packed rows into hidden states and a head, never into logits."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from capgap_kernels import TeacherHead, TeacherSamples, TeacherTopK, route
from data_prep.errors import ConfigError
from data_prep.shards import Manifest
from pipeline.cached_signals import STEPS_PER_NAT, CacheManifest
from pipeline.config import StudentConfig, TeacherConfig
from pipeline.signals import Batch, RouterSignals, Signals

# B rows, T tokens of a row, D hidden width, V vocabulary, N = B*T tokens, E experts

# Settings with which logits are more than hidden states times head: losses from hidden states would be wrong.
LOGIT_SETTINGS = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1}


class DecoderStudent(nn.Module):
    """A causal language model of transformers; a mixture-of-experts one reports its routers."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        *,
        num_ids: int,
        teacher_width: int | None = None,
        compared_layers: tuple[int, ...] = (),
    ):
        """
        Args:
            teacher_width: of the hidden states to which the student's are mapped for a loss; None: there is none.
            compared_layers: from 1 on, those whose outputs are mapped; () maps the last hidden states.
        """
        super().__init__()
        self.backbone = backbone
        self.compared_layers = compared_layers
        width, count = backbone.config.hidden_size, max(1, len(compared_layers))
        maps = [] if teacher_width is None else [nn.Linear(width, teacher_width, bias=False) for _ in range(count)]
        self.to_teacher = nn.ModuleList(maps)
        self.num_ids = num_ids
        self.router_names = tuple(name for name, module in backbone.base_model.named_modules() if is_mixture(module))
        self._rotary = {name: buffer.clone() for name, buffer in backbone.named_buffers() if name.endswith("inv_freq")}

    def _apply(self, fn, recurse=True):
        # bf16 rotary frequencies turn late positions by wrong angles; the exported model has them in float32.
        super()._apply(fn, recurse)
        for name, exact in self._rotary.items():
            buffer = self.backbone.get_buffer(name)
            buffer.data = exact.to(buffer.device)
        return self

    def forward(self, batch: Batch) -> Signals:
        with outputs_of(self.backbone.base_model, self.compared_layers) as states:
            encoded = run_packed(self.backbone, batch, output_router_logits=bool(self.router_names))
        compared = states or [encoded.last_hidden_state]
        head = self.backbone.get_output_embeddings()
        return Signals(
            valid_BT=batch.valid_BT,
            hidden_states_BTD=encoded.last_hidden_state,
            compared_states=tuple(linear(state) for linear, state in zip(self.to_teacher, compared, strict=False)),
            head_VD=head.weight,
            head_bias_V=head.bias,
            num_ids=self.num_ids,
            labels_BT=batch.labels_BT,
            routers=self._router_signals(getattr(encoded, "router_logits", None) or (), batch.valid_BT.flatten()),
        )

    def _router_signals(self, logits: tuple[Tensor, ...], valid_N: Tensor) -> dict[str, RouterSignals]:
        top_k = getattr(self.backbone.config, "num_experts_per_tok", 1)
        signals = {}
        for name, logits_NE in zip(self.router_names, logits, strict=True):
            routing = route(logits_NE, top_k=top_k, valid_N=valid_N)
            signals[name] = RouterSignals(
                routing.gate_sum_E, routing.tokens_per_expert_E, routing.z_loss_sum, routing.entropy_sum
            )
        return signals

    def served_model(self) -> PreTrainedModel:
        """What users load: the same model, without memory until it is filled with the trained weights."""
        with torch.device("meta"):
            return type(self.backbone)(self.backbone.config)


def is_mixture(module: Any) -> bool:
    """Whether this is a feed-forward layer of experts behind a gate."""
    return isinstance(getattr(module, "gate", None), nn.Module) and isinstance(
        getattr(module, "experts", None), nn.Module
    )


def run_packed(model: PreTrainedModel, batch: Batch, **wanted: Any) -> Any:
    """The output of the decoder below its head, each document seeing itself alone.

    transformers reads the documents from positions that begin anew, when there is neither a mask nor a cache: a block
    diagonal for sdpa and flex attention, variable lengths for flash attention.
    """
    return model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **wanted)


@contextmanager
def outputs_of(body: Any, layers: tuple[int, ...]) -> Iterator[list[Tensor]]:
    """A list that a forward within the block fills with the outputs of these layers, counted from 1, in their order."""
    found: dict[int, Tensor] = {}
    states: list[Tensor] = []

    def keep(number: int, output: Any) -> None:
        found[number] = output if isinstance(output, Tensor) else output[0]

    with ExitStack() as hooks:
        for number in set(layers):
            layer = body.layers[number - 1]
            hook = layer.register_forward_hook(lambda _, __, output, number=number: keep(number, output))
            hooks.callback(hook.remove)
        yield states
    states.extend(found[number] for number in layers)


class CausalTeacher(nn.Module):
    """A frozen causal language model that hands over hidden states and head, a few rows at a time."""

    def __init__(self, model: PreTrainedModel, *, micro_size: int | None = None, compared_layers: tuple[int, ...] = ()):
        """
        Args:
            micro_size: rows that go through it together; None: all.
            compared_layers: from 1 on, whose outputs a loss reads; () offers the last hidden states.
        """
        super().__init__()
        self.compared_layers = compared_layers
        model.eval().requires_grad_(False)
        self.body: Any = model.base_model
        self.head: Any = model.get_output_embeddings()
        self.micro_size = micro_size

    # Not inference_mode: a sharded body gathers and frees its weights in place.
    @torch.no_grad()
    def forward(self, batch: Batch) -> Signals:
        rows = self.micro_size or len(batch.input_ids)
        parts = []
        for ids, positions in zip(batch.input_ids.split(rows), batch.position_ids.split(rows), strict=True):
            with outputs_of(self.body, self.compared_layers) as states:
                last = self.body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            parts.append([last, *states])
        hidden_BTD, *compared = (torch.cat(part) for part in zip(*parts, strict=True))
        compared = compared or [hidden_BTD]
        said = TeacherHead(hidden_BTD.flatten(0, 1), self.head.weight, self.head.bias)
        return Signals(
            valid_BT=batch.valid_BT, hidden_states_BTD=hidden_BTD, compared_states=tuple(compared), next_token=said
        )


class NoTeacher(nn.Module):
    """Stands in for a teacher where text alone teaches."""

    def forward(self, batch: Batch) -> Signals:
        return Signals(valid_BT=batch.valid_BT)


class CachedTeacher(nn.Module):
    """A teacher that has spoken before: unpacks what `capgap cache` stored about the rows of a batch."""

    def __init__(self, manifest: CacheManifest):
        super().__init__()
        self.manifest = manifest

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Signals:
        assert batch.cached_signals is not None
        packed = {name: _unsigned(part) for name, part in batch.cached_signals.items()}
        ids_NK = packed["ids"].flatten(0, 1)
        rest_N = packed["rest"].flatten().float() / STEPS_PER_NAT
        said: TeacherTopK | TeacherSamples
        if self.manifest.signal == "sampled":
            weights_NK = torch.full(ids_NK.shape, 1 / self.manifest.k, device=ids_NK.device)
            said = TeacherSamples(ids_NK, weights_NK, rest_N)
        else:
            said = TeacherTopK(ids_NK, packed["values"].flatten(0, 1).float() / -STEPS_PER_NAT, -rest_N)
        return Signals(valid_BT=batch.valid_BT, next_token=said)


def _unsigned(part: Tensor) -> Tensor:
    """int64 of integers whose bits are unsigned."""
    return part.long() & (2 ** (8 * part.element_size()) - 1)


def outline_of_teacher(
    folder: Path, config: TeacherConfig, *, dtype: torch.dtype, attention: str = "sdpa"
) -> PreTrainedModel:
    """The model of a folder without memory for its weights: what it takes to count them, or to fill them in later."""
    trusted = config.trust_remote_code
    model = outline_of_decoder(
        AutoConfig.from_pretrained(folder, trust_remote_code=trusted),
        dtype=dtype,
        trust_remote_code=trusted,
        attn_implementation=attention,
    )
    check_logits(model.config, "teacher.model")
    return model


def outline_of_decoder(config: Any, **options: Any) -> PreTrainedModel:
    """A causal language model of a transformers config without memory for its weights."""
    from accelerate import init_empty_weights

    # Buffers are computed from the config, so they are there.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, **options)
    model.tie_weights()
    return model


def load_causal_teacher(
    folder: Path,
    config: TeacherConfig,
    *,
    dtype: torch.dtype,
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
) -> CausalTeacher:
    """The frozen teacher of a model folder, read straight onto the device: ranks share their machine's memory."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=config.trust_remote_code,
        use_safetensors=True,
        attn_implementation=attention,
        device_map={"": device},
    )
    check_logits(model.config, "teacher.model")
    return CausalTeacher(model, micro_size=config.micro_size)


def build_decoder(
    config: StudentConfig,
    manifest: Manifest,
    *,
    init_folder: Path | None,
    seed: int,
    teacher_width: int | None = None,
    compared_layers: tuple[int, ...] = (),
    attention: str = "sdpa",
    is_outline: bool = False,
) -> DecoderStudent:
    """A decoder with its first weights: those of a folder, or random ones of its shape or of the recipe's sizes.

    Args:
        manifest: of the shards, whose tokenizer and row length a decoder of the recipe's sizes takes over.
        init_folder: AutoModelForCausalLM folder; None builds a LLaMA from the recipe's sizes.
        teacher_width: of the hidden states to which the student's are mapped for a loss; None: there is no such loss.
        compared_layers: from 1 on, whose outputs are mapped; () maps the last hidden states.
        is_outline: leave out the weights and the memory for them.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": attention}
    # The caller's random state stays as it was, so that a resumed run draws what the unbroken run drew.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = AutoConfig.from_pretrained(init_folder) if init_folder else llama_config(config, manifest)
        if is_outline:
            backbone = outline_of_decoder(shape, **options)
        elif init_folder is None or config.random_weights:
            backbone = AutoModelForCausalLM.from_config(shape, **options)
        else:
            backbone = AutoModelForCausalLM.from_pretrained(init_folder, use_safetensors=True, **options)
        check_logits(backbone.config, "student.init_from")
        return DecoderStudent(
            backbone,
            num_ids=manifest.tokenizer["vocab_size"],
            teacher_width=teacher_width,
            compared_layers=compared_layers,
        )


def llama_config(config: StudentConfig, manifest: Manifest) -> LlamaConfig:
    """The shape of a LLaMA with the recipe's sizes and the vocabulary and length of the shards."""
    tokenizer = manifest.tokenizer
    special: dict[str, Any] = {f"{name}_token_id": tokenizer.get(f"{name}_id") for name in ("bos", "eos", "pad")}
    return LlamaConfig(
        vocab_size=tokenizer["vocab_size"],
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads or config.num_attention_heads,
        max_position_embeddings=manifest.length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=config.tie_word_embeddings,
        **special,
    )


def check_logits(config: Any, key: str) -> None:
    """Refuses models whose logits are not just hidden states times head."""
    for name, neutral in LOGIT_SETTINGS.items():
        value = getattr(config, name, None)
        if value not in (None, neutral):
            raise ConfigError(
                f"{key}: {config.model_type} has {name} ({value}) - losses are computed from hidden states and head, "
                "which give other logits - choose a LLaMA-, Mistral-, Mixtral- or Qwen-like model"
            )
