"""What a run is: frozen dataclasses, one line of doc under each field, read from a YAML recipe and dotted flags.

Nothing here imports torch, so that a mistake shows within a second of pressing enter.
"""

import difflib
import json
import sys
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import ConfigError

PROJECT_ROOT = Path(__file__).resolve().parent.parent


def _require(valid: bool, key: str, value: Any, rule: str) -> None:
    # NaN fails every comparison, so conditions say what is valid.
    if not valid:
        raise ConfigError(f"{key} ({value}) is out of range - it must {rule}")


@dataclass(frozen=True)
class DataConfig:
    """Which shards are read, and in which order."""

    shards: str = "???"
    """Folder written by `capgap prepare`."""
    order_seed: int = 0
    """Seed of the global sample order; with the epoch it alone decides the order."""

    def __post_init__(self) -> None:
        _require(0 <= self.order_seed < 2**63, "data.order_seed", self.order_seed, "lie between 0 and 2**63 - 1")


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen model that is imitated."""

    model: str | None = "???"
    """Local folder, hub name, or `package:NAME`; null trains a decoder on text alone (`capgap pretrain`)."""
    cache: str | None = None
    """Folder written by `capgap cache`, read instead of running the teacher. Decoders only."""
    revision: str | None = None
    """Hub revision; required together with trust_remote_code."""
    placement: Literal["auto", "resident", "sharded"] = "auto"
    """Decoders: a whole teacher on every rank, or its layers sharded over the ranks; auto shards what is too big."""
    micro_size: int | None = None
    """Decoders: rows that go through the teacher together; null takes batch.micro_size."""
    compile: bool = False
    """Encoders: run the teacher through torch.compile. The first step then waits for the compiler, minutes on a CPU."""
    relation_layer: int = -1
    """Layer whose query, key and value relations are imitated: -1 is the last; for 24 layers an upper-middle one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the teacher. Needs a pinned revision or a local folder."""


@dataclass(frozen=True)
class StudentConfig:
    """The model that is trained."""

    architecture: Literal["dense", "minimoe", "decoder"] = "minimoe"
    """`dense` is a plain BertModel, `minimoe` has minimal experts (arXiv 2305.12129), `decoder` is a causal LM."""
    num_hidden_layers: int = 3
    """Transformer blocks."""
    hidden_size: int = 384
    """Width of the hidden states."""
    num_attention_heads: int = 12
    """Attention heads."""
    num_key_value_heads: int | None = None
    """Key and value heads of a decoder built from these sizes; null takes num_attention_heads."""
    tie_word_embeddings: bool = False
    """Whether a decoder built from these sizes shares its embedding with its head."""
    intermediate_size: int = 1536
    """Width of each expert's (or the dense) feed-forward layer."""
    num_experts: int = 4
    """Feed-forward experts per layer, one of which is active per token. Only minimoe reads it."""
    num_attention_experts: int = 1
    """Attention experts per layer (query, key, value and output maps); 1 is plain attention. Only minimoe reads it."""
    router_jitter: float = 0.0
    """Uniform noise of plus or minus this size on the router logits in training."""
    selection_bias_rate: float = 0.0
    """Step of the bias that evens out the experts' loads without a loss (arXiv 2408.15664, which takes 0.001); 0: none.

    It is moved once per optimizer step, by the load of the global batch. Only minimoe reads it.
    """
    dropout: float = 0.0
    """Dropout on hidden states and attention in training."""
    init_from: str | None = None
    """Folder to start from, or `teacher`; none starts from random weights of the sizes above.

    Encoders: a BERT-family folder of the same width. Decoders: any causal LM, whose own sizes then count: one written
    by `capgap prune`, `capgap upcycle` or an earlier run.
    """
    random_weights: bool = False
    """Decoders: take only the shape of init_from, with random weights."""
    init_layers: tuple[int, ...] | None = None
    """Layers of init_from that become the student's layers; none spreads them evenly and ends at the last."""
    expert_init: Literal["identical", "shared", "importance"] = "shared"
    """How one dense feed-forward layer becomes experts; importance shares the neurons with the largest weights."""
    shared_fraction: float = 0.6667
    """Part of each expert's neurons that all experts start with (arXiv 2305.12129); the rest is its own."""

    def __post_init__(self) -> None:
        counts = "num_hidden_layers hidden_size num_attention_heads intermediate_size num_experts num_attention_experts"
        for name in counts.split():
            _require(getattr(self, name) >= 1, f"student.{name}", getattr(self, name), "be at least 1")
        _require(0 <= self.dropout < 1, "student.dropout", self.dropout, "be 0 or more and less than 1")
        _require(0 <= self.router_jitter < float("inf"), "student.router_jitter", self.router_jitter, "be 0 or more")
        rate = self.selection_bias_rate
        _require(0 <= rate < 1, "student.selection_bias_rate", rate, "be 0 or more and less than 1")
        if rate and self.architecture != "minimoe":
            raise ConfigError(
                f"student.selection_bias_rate ({rate}): a {self.architecture} student's export has no selection bias "
                "(Mixtral and Qwen3-MoE neither) and would route otherwise - set it to 0 and use loss.balance"
            )
        _require(0 <= self.shared_fraction <= 1, "student.shared_fraction", self.shared_fraction, "lie between 0 and 1")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"student.hidden_size ({self.hidden_size}) is not divisible by student.num_attention_heads "
                f"({self.num_attention_heads}) - every head needs the same width - change one of the two"
            )
        if self.num_key_value_heads is not None:
            _require(self.num_key_value_heads >= 1, "student.num_key_value_heads", self.num_key_value_heads, "be 1 up")
            if self.num_attention_heads % self.num_key_value_heads:
                raise ConfigError(
                    f"student.num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                    f"student.num_key_value_heads ({self.num_key_value_heads}) - groups must be equal - change one of "
                    "the two"
                )
        for name in ("dropout", "router_jitter"):
            if self.architecture == "decoder" and getattr(self, name):
                raise ConfigError(f"student.{name} ({getattr(self, name)}) is for encoders - leave it 0 for a decoder")
        if self.random_weights and (self.architecture != "decoder" or self.init_from is None):
            raise ConfigError("student.random_weights takes the shape of a decoder's student.init_from - give both")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses; a loss of weight 0 is not computed."""

    relation_kl: float = 1.0
    """MiniLMv2 self-relations (arXiv 2012.15828): mean over Q-Q, K-K and V-V of KL(teacher || student)."""
    num_relation_heads: int = 32
    """Heads that the queries, keys and values are cut into for the relations."""
    logit_kl: float = 0.0
    """Decoders: KL(teacher || student) over the vocabulary. Not multiplied by temperature^2."""
    reverse_kl: float = 0.0
    """Decoders: KL(student || teacher) over the vocabulary; instead of logit_kl."""
    jsd: float = 0.0
    """Decoders: generalised Jensen-Shannon divergence (arXiv 2306.13649); instead of logit_kl."""
    jsd_beta: float = 0.5
    """Part of the teacher in the mixture of jsd, between 0 and 1."""
    hidden_cosine: float = 0.0
    """Decoders: 1 - cosine of hidden states, the student's through linear maps that are not exported."""
    hidden_layers: tuple[int, ...] | None = None
    """Layer of the teacher, from 1 on, that each layer of the student imitates by hidden_cosine; 0 leaves one out.

    null compares the last hidden states alone, after the last norm.
    """
    temperature: float = 1.0
    """Temperature of both sides of the divergence; the cross-entropy has 1."""
    cross_entropy: float = 0.0
    """Decoders: next-token cross-entropy with the text."""
    distillation_schedule: Literal["constant", "wsd", "stop"] = "constant"
    """Weight of the divergence after distillation_hold: the same, falling to 0 at the end (wsd), or 0 at once (stop).

    What it loses, cross_entropy gains.
    """
    distillation_hold: float = 0.8
    """Part of all steps before wsd falls or stop ends."""
    balance: float = 0.01
    """Load balance over the global batch: E * sum_e(mean gate_e * token share_e), mean over routers."""
    router_z: float = 0.0
    """Mean squared logsumexp of the router logits (arXiv 2202.08906)."""

    def __post_init__(self) -> None:
        _require(self.num_relation_heads >= 1, "loss.num_relation_heads", self.num_relation_heads, "be at least 1")
        for name, weight in asdict(self).items():
            if isinstance(weight, int | float):
                _require(0 <= weight < float("inf"), f"loss.{name}", weight, "be 0 or more")
        if self.hidden_layers is not None:
            _require(
                bool(self.hidden_cosine) and min(self.hidden_layers, default=0) >= 0 and any(self.hidden_layers),
                "loss.hidden_layers",
                list(self.hidden_layers),
                "name layers from 1 on (0 for none), and loss.hidden_cosine must have a weight",
            )
        _require(self.temperature > 0, "loss.temperature", self.temperature, "be more than 0")
        _require(0 < self.jsd_beta < 1, "loss.jsd_beta", self.jsd_beta, "lie between 0 and 1; the ends are the two KLs")
        _require(self.distillation_hold <= 1, "loss.distillation_hold", self.distillation_hold, "lie between 0 and 1")
        given = [name for name in ("logit_kl", "reverse_kl", "jsd") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(f"loss.{given[0]} and loss.{given[1]} are both given - drop one of the two divergences")

    @property
    def compared_layers(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Layers of the student and, in the same order, of the teacher, from 1 on, whose outputs are compared."""
        pairs = [(ours, theirs) for ours, theirs in enumerate(self.hidden_layers or (), 1) if theirs]
        return tuple(ours for ours, _ in pairs), tuple(theirs for _, theirs in pairs)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls after the warm-up."""
    warmup_fraction: float = 0.01
    """Part of all steps over which the rate rises from zero."""
    final_learning_rate_ratio: float = 0.0
    """Where the schedule ends, as a part of the peak."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices and embeddings; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 5.0
    """Global gradient norm is clipped to this; 0 turns clipping off."""

    def __post_init__(self) -> None:
        rate, infinity = self.learning_rate, float("inf")
        _require(0 < rate < infinity, "optimizer.learning_rate", rate, "be more than 0")
        for name in ("warmup_fraction", "final_learning_rate_ratio"):
            _require(0 <= getattr(self, name) <= 1, f"optimizer.{name}", getattr(self, name), "lie between 0 and 1")
        for name in ("weight_decay", "epsilon", "max_grad_norm"):
            _require(0 <= getattr(self, name) < infinity, f"optimizer.{name}", getattr(self, name), "be 0 or more")
        _require(
            all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "each be 0 or more and less than 1"
        )


@dataclass(frozen=True)
class BatchConfig:
    """How many rows make a step. Accumulation steps follow: global / (micro * ranks)."""

    global_size: int = 1024
    """Rows per optimizer step over all ranks."""
    micro_size: int = 128
    """Rows per forward pass on one rank."""

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches that one rank runs per step; ConfigError names the nearest valid sizes if it is not whole."""
        stride = self.micro_size * world_size
        if self.global_size < 1 or self.micro_size < 1:
            raise ConfigError(f"batch sizes must be at least 1 (global {self.global_size}, micro {self.micro_size})")
        if self.global_size % stride == 0:
            return self.global_size // stride
        below, above = self.global_size // stride * stride, (self.global_size // stride + 1) * stride
        nearest = " or ".join(str(size) for size in (below, above) if size)
        per_rank = self.global_size // world_size if self.global_size % world_size == 0 else 0
        micro = max((m for m in range(1, min(self.micro_size, per_rank) + 1) if per_rank % m == 0), default=0)
        mend = f"set batch.global_size to {nearest}" + (f", or batch.micro_size to {micro}" if micro else "")
        raise ConfigError(
            f"batch.global_size ({self.global_size}) is not a multiple of batch.micro_size x ranks "
            f"({self.micro_size} x {world_size} = {stride}) - every rank must run whole micro-batches - {mend}"
        )


@dataclass(frozen=True)
class EngineConfig:
    """How the step is run."""

    ds_config: str = "ds_configs/zero1.json"
    """DeepSpeed JSON with ZeRO, offload and communication settings; nothing that this schema already says."""
    expert_parallel_size: int = 1
    """Ranks that share the experts of a layer; divides experts and ranks. 1 keeps every expert on every rank."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of student and teacher; bf16 keeps fp32 master weights and gradient sums."""
    attention: Literal["sdpa", "flash_attention_2", "flex_attention", "eager"] = "sdpa"
    """Decoders: transformers' attention of student and teacher; documents in a row stay apart with each of them."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about one more student forward."""
    timeout_minutes: float = 30.0
    """A step or collective that takes longer ends the run, naming the rank that did not arrive."""
    max_skipped_steps: int = 3
    """Updates in a row that may be skipped for a non-finite gradient before the run stops."""
    on_collapse: Literal["warn", "reseed", "stop"] = "warn"
    """When a router sends nearly everything to few of its experts, five logs in a row.

    `reseed` makes its dead experts noisy copies of the busiest one; log.every_steps then decides when.
    """

    def __post_init__(self) -> None:
        _require(0 < self.timeout_minutes < 1e6, "engine.timeout_minutes", self.timeout_minutes, "be more than 0")
        _require(self.max_skipped_steps >= 0, "engine.max_skipped_steps", self.max_skipped_steps, "be 0 or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """What survives a kill."""

    every_steps: int = 500
    """Steps between checkpoints; the last step always has one."""
    keep_last: int = 3
    """Complete checkpoints that are kept; older ones go only after a newer one was read back from disk."""
    copy_to: str | None = None
    """A second folder, of this run alone, to which checkpoints are copied meanwhile; a resume looks there too."""

    def __post_init__(self) -> None:
        _require(self.every_steps >= 1, "checkpoint.every_steps", self.every_steps, "be at least 1")
        _require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "be at least 1")


@dataclass(frozen=True)
class LogConfig:
    """What is seen while it runs."""

    every_steps: int = 10
    """Steps between lines in metrics.jsonl, TensorBoard and the progress line."""

    def __post_init__(self) -> None:
        _require(self.every_steps >= 1, "log.every_steps", self.every_steps, "be at least 1")


@dataclass(frozen=True)
class RunConfig:
    """One distillation run."""

    out: str = "???"
    """Folder of the run: checkpoints, logs, export."""
    steps: int | None = None
    """Optimizer steps; give this or epochs."""
    epochs: float | None = None
    """Passes over the shards; give this or steps."""
    seed: int = 0
    """Seed of the initial weights, dropout and jitter."""
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _require(self.steps is None or self.steps >= 1, "steps", self.steps, "be at least 1")
        _require(self.epochs is None or 0 < self.epochs < float("inf"), "epochs", self.epochs, "be more than 0")
        _require(bool(self.out.strip()), "out", repr(self.out), "name a folder")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "lie between 0 and 2**32 - 1")

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps of the whole run over shards of `num_rows` rows."""
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(f"give exactly one of steps ({self.steps}) and epochs ({self.epochs})")
        if num_rows < self.batch.global_size:
            raise ConfigError(
                f"batch.global_size ({self.batch.global_size}) is larger than the data: {self.data.shards} has "
                f"{num_rows} rows - lower batch.global_size to {num_rows} or less, or prepare more text"
            )
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, int(num_rows * self.epochs) // self.batch.global_size)


# Keys that may change between the runs of one output folder: they say how the work is cut and watched, not what is
# computed (the order of sums and the draws of dropout and jitter change with the cut).
SAFE_TO_CHANGE: tuple[str, ...] = (
    "log.",
    "checkpoint.",
    "engine.timeout_minutes",
    "engine.ds_config",
    "engine.expert_parallel_size",
    "engine.activation_checkpointing",
    "engine.on_collapse",
    "batch.micro_size",
    "out",
)


def load_run_config(path: str | Path, overrides: list[str]) -> RunConfig:
    """Reads a recipe (with its `extends` chain), applies dotted flags, and checks every key, type and range.

    Args:
        path: YAML recipe; `extends: other.yaml` is read relative to it and overridden by it.
        overrides: `--section.field value` or `--section.field=value` pairs.

    Raises:
        ConfigError: names every mistake: the file or flag, the key, and the nearest known key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    problems: list[str] = []
    layers = [*_recipe_layers(Path(path), problems), *_flag_layers(overrides, problems)]
    merged = OmegaConf.structured(RunConfig)
    _make_writable(merged)
    try:
        for origin, layer in layers:
            try:
                merged = _merge(merged, layer, origin)
            except ConfigError as error:
                problems.append(str(error))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing and not problems:
            problems.append(f"{path}: {', '.join(missing)} must be given - add it to the recipe or as --{missing[0]}")
        for spec in fields(RunConfig):
            if is_dataclass(spec.type) and not any(key.startswith(f"{spec.name}.") for key in missing):
                try:
                    OmegaConf.to_object(merged[spec.name])
                except ConfigError as error:
                    problems.append(str(error))
        if problems:
            raise ConfigError(listed(problems))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    assert isinstance(config, RunConfig)
    return config


def listed(problems: list[str]) -> str:
    """One problem as it is; several in one message, a line each."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:" + "".join(f"\n  {number}. {text}" for number, text in enumerate(problems, 1))


def _recipe_layers(path: Path, problems: list[str]) -> list[tuple[str, Any]]:
    """The chain of `extends`, the most general recipe first."""
    import yaml
    from omegaconf import DictConfig, OmegaConf

    layers: list[tuple[str, Any]] = []
    seen: set[Path] = set()
    while True:
        if path.resolve() in seen:
            raise ConfigError(f"{path}: extends itself - break the circle")
        seen.add(path.resolve())
        if not path.is_file():
            raise ConfigError(f"recipe not found: {path} - give an existing YAML file with --config")
        try:
            layer = OmegaConf.load(path)
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            where = getattr(error, "problem_mark", None)
            line = f":{where.line + 1}" if where else ""
            reason = getattr(error, "problem", None) or _first_line(error)
            raise ConfigError(f"{path}{line}: not readable as YAML - {reason}") from error
        if not isinstance(layer, DictConfig):
            raise ConfigError(f"{path}: a recipe is a mapping of sections, not a {type(layer).__name__}")
        parent = layer.pop("extends", None)
        tree = OmegaConf.to_container(layer)
        unknown = [key for key in _dotted_keys(tree) if key not in known_keys()]
        # Of an unknown section, the section alone.
        tops = [key for key in unknown if not any(key.startswith(f"{other}.") for other in unknown)]
        problems += [_unknown_key(key, str(path)) for key in tops]
        if unknown:
            layer = OmegaConf.create(_without(tree, unknown))
        layers.insert(0, (str(path), layer))
        if parent is None:
            return layers
        path = path.parent / str(parent)


def _flag_layers(overrides: list[str], problems: list[str]) -> list[tuple[str, Any]]:
    """One layer per flag, so that an error can name its flag."""
    from omegaconf import OmegaConf

    layers = []
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r} - values are given as --section.field value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"flag --{key} has no value - write --{key} VALUE")
            value = words.pop(0)
        key = key.replace("-", "_")
        if key not in known_keys():
            problems.append(_unknown_key(key, f"flag --{key}"))
            continue
        layers.append((f"flag --{key}", OmegaConf.create(_nested(key, _flag_value(key, value)))))
    return layers


def _flag_value(key: str, text: str) -> Any:
    """What a flag's text means to its field. To a string it is itself: as YAML, the revision 0123 would be 83."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    kind = _field_type(key)
    if kind is str or (kind == str | None and text != "null"):
        return text
    try:
        return OmegaConf.from_dotlist([f"value={text}"])["value"]
    except YAMLError as error:
        raise ConfigError(f"flag --{key}: {text!r} is not readable as YAML - {_first_line(error)}") from error


def _field_type(key: str) -> Any:
    kind: Any = RunConfig
    for name in key.split("."):
        kind = next(spec.type for spec in fields(kind) if spec.name == name)
    return kind


def _nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _merge(config: Any, layer: Any, origin: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.merge(config, layer)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or _refused_key(config, layer)
        raise ConfigError(f"{origin}: {key + ': ' if key and key not in origin else ''}{_first_line(error)}") from error


def _refused_key(config: Any, layer: Any) -> str:
    """The first key of a layer that alone cannot be merged: OmegaConf does not name it in every error."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = OmegaConf.to_container(layer)
    assert isinstance(tree, dict)
    for key, value in _flatten(tree).items():
        try:
            OmegaConf.merge(config, _nested(key, value))
        except OmegaConfBaseException:
            return key
    return ""


def known_keys(schema: type = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the schema, sections included."""
    keys: list[str] = []
    for spec in fields(schema):
        keys.append(prefix + spec.name)
        if isinstance(spec.type, type) and is_dataclass(spec.type):
            keys += known_keys(spec.type, f"{prefix}{spec.name}.")
    return keys


def _dotted_keys(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return []
    keys = []
    for name, value in tree.items():
        keys += [f"{prefix}{name}", *_dotted_keys(value, f"{prefix}{name}.")]
    return keys


def _without(tree: Any, keys: list[str], prefix: str = "") -> Any:
    if not isinstance(tree, dict):
        return tree
    kept = {name: part for name, part in tree.items() if f"{prefix}{name}" not in keys}
    return {name: _without(part, keys, f"{prefix}{name}.") for name, part in kept.items()}


def _unknown_key(key: str, origin: str) -> str:
    keys = known_keys()
    # A typo in the section name must not hide the field, so whole dotted keys are compared.
    nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    hint = (
        f" - did you mean {nearest[0]}?"
        if nearest
        else f" - sections are {', '.join(f.name for f in fields(RunConfig))}"
    )
    return f"{origin}: unknown key {key}{hint}"


def _make_writable(node: Any) -> None:
    # Frozen dataclasses arrive read-only, which would refuse the merge; the result is frozen again.
    from omegaconf import DictConfig, OmegaConf

    OmegaConf.set_readonly(node, False)
    for name in node:
        if not OmegaConf.is_missing(node, name) and isinstance(node[name], DictConfig):
            _make_writable(node[name])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# Top-level keys of a DeepSpeed 0.19 config. DeepSpeed itself ignores what it does not know: a misspelt
# `zero_optimization` trains at stage 0 without a word.
DS_CONFIG_KEYS = frozenset(
    """activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
    compile csv_monitor data_efficiency data_types dataloader_drop_last disable_allgather disable_python_gc
    dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op
    gradient_clipping gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation
    memory_breakdown optimizer pipeline prescale_gradients scheduler seq_parallel_communication_data_type
    sequence_parallel_size steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size
    train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb
    weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """.split()
)
# What RunConfig (or the trainer) says; a second place for the same number would have to be kept in step by hand.
DS_CONFIG_OWNED = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size and batch.micro_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.schedule",
    "bf16": "engine.precision",
    "bfloat16": "engine.precision",
    "fp16": "engine.precision",
    "tensorboard": "log.*",
    # The trainer scales losses itself and calls step() after every micro-batch.
    "gradient_allreduce_op": "batch.*",
    "managed_gradient_accumulation": "batch.*",
}


def load_ds_config(name: str) -> dict[str, Any]:
    """Reads a DeepSpeed JSON, refusing keys that DeepSpeed does not know and keys that RunConfig owns."""
    path = next((p for p in (Path(name), PROJECT_ROOT / name) if p.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.name for p in (PROJECT_ROOT / "ds_configs").glob("*.json")))
        raise ConfigError(f"engine.ds_config not found: {name} - give a JSON file; ds_configs/ holds {known}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_refuse_duplicate_keys)
    except ValueError as error:
        raise ConfigError(f"{path}: not readable as JSON - {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: a DeepSpeed config is a JSON object")
    for key in settings:
        if key in DS_CONFIG_OWNED:
            raise ConfigError(f"{path}: {key} belongs to the recipe - remove it here and set {DS_CONFIG_OWNED[key]}")
        if key not in DS_CONFIG_KEYS:
            nearest = difflib.get_close_matches(key, sorted(DS_CONFIG_KEYS), n=1, cutoff=0.5)
            hint = f" - did you mean {nearest[0]}?" if nearest else ""
            raise ConfigError(f"{path}: DeepSpeed knows no key {key} and would ignore it{hint}")
    return settings


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"key {twice} appears twice")
    return dict(pairs)


def changed_keys(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Dotted keys whose value differs and that decide numbers: `key (old -> new)`, safe keys left out."""
    # A field that an older version did not know had what is now its default.
    flat_before, flat_after = _flatten(asdict(RunConfig())) | _flatten(before), _flatten(after)
    safe = SAFE_TO_CHANGE
    if flat_after["engine.on_collapse"] == "reseed":
        safe = tuple(key for key in safe if key != "log.")  # how often it looks decides what it computes
    return [
        f"{key} ({flat_before.get(key)} -> {flat_after.get(key)})"
        for key in sorted(flat_before.keys() | flat_after.keys())
        if flat_before.get(key) != flat_after.get(key) and not key.startswith(safe)
    ]


def _flatten(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat


def print_fields() -> None:
    """Prints every field with its default and its line of doc (the `--help` of a run)."""
    import tyro

    parser = tyro.extras.get_parser(
        RunConfig, prog="pipeline.distill", description="Distils one student from a recipe."
    )
    parser.print_help(sys.stdout)
