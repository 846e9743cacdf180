"""Finds what is wrong with a run before anything heavy is imported."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_prep.errors import CapgapError, ConfigError, DataError
from data_prep.files import read_json
from data_prep.model_folders import find_model_folder, read_model_config
from data_prep.shards import ShardSet, folder_vocabulary, open_shards, tokenizer_hash
from pipeline.cached_signals import CachedSignals, check_cache
from pipeline.config import RunConfig, changed_keys, listed, load_ds_config
from pipeline.parallel_rules import check_parallelism
from pipeline.ranks import is_taken

Result = TypeVar("Result")


@dataclass(frozen=True)
class Checked:
    """What the checks found on the way."""

    shards: ShardSet
    teacher_folder: Path | None
    teacher_config: dict[str, Any]
    init_folder: Path | None
    zero_stage: int
    accumulation_steps: int
    num_steps: int
    cache: CachedSignals | None = None


class Problems:
    """Collects what is wrong, so that a user hears of everything at once."""

    def __init__(self) -> None:
        self.found: list[CapgapError] = []

    def none_in(self, check: Callable[..., Result], *args: Any, **kwargs: Any) -> Result | None:
        """The result of check(*args), or None when it found a problem."""
        try:
            return check(*args, **kwargs)
        except CapgapError as error:
            self.found.append(error)
            return None

    def raise_if_any(self) -> None:
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise type(self.found[0])(listed([str(problem) for problem in self.found]))


def check_run(config: RunConfig, world_size: int, *, port: int | None = None) -> Checked:
    """Everything that can be known without torch; one error names every problem, a line each, in the recipe's order.

    Args:
        port: of the launcher, if it has not been started yet.
    """
    problems = Problems()
    check = problems.none_in
    is_decoder = config.student.architecture == "decoder"
    shards = check(open_rows, config.data.shards, "lm-blocks" if is_decoder else "bert-pairs")
    num_steps = check(config.num_steps, len(shards)) if shards else None
    check(check_losses, config)
    check(check_trust, config)
    check(check_copies, config)
    name = config.teacher.model
    teacher_folder = check(find_model_folder, name, revision=config.teacher.revision) if name else None
    teacher_config = check(read_model_config, teacher_folder) if teacher_folder else None
    check(check_own_code, config, teacher_config)
    if shards and teacher_folder:
        check(check_vocabulary, shards, teacher_folder)
    if teacher_config and not is_decoder:
        check(check_relation_heads, config, teacher_config)
    if shards and teacher_config:
        check(check_length, shards, teacher_config)
        check(check_head, shards, teacher_config, f"teacher.model {name}")
    cache = None
    if config.teacher.cache is not None and shards:
        cache = check(open_cache, config, shards, teacher_folder)
    source = config.student.init_from
    init_folder = teacher_folder if source == "teacher" else check(find_model_folder, source) if source else None
    if teacher_config and is_decoder and config.loss.hidden_layers is not None and (source is None or init_folder):
        check(check_hidden_layers, config, teacher_config, init_folder)
    if is_decoder and shards and init_folder:
        check(check_head, shards, read_model_config(init_folder), f"student.init_from {source}")
    elif not is_decoder and (source is None or init_folder):
        check(check_init_layers, config, init_folder)
    accumulation = check(config.batch.accumulation_steps, world_size)
    settings = check(load_ds_config, config.engine.ds_config)
    stage = None if settings is None else check(check_parallelism_of, config, settings, world_size, init_folder)
    if shards:
        check(check_same_run, config, shards)
    if port is not None:
        check(check_port, port)
    problems.raise_if_any()
    assert shards and accumulation and num_steps and stage is not None
    return Checked(shards, teacher_folder, teacher_config or {}, init_folder, stage, accumulation, num_steps, cache)


def open_cache(config: RunConfig, shards: ShardSet, teacher_folder: Path | None) -> CachedSignals:
    """The teacher's cached signals, which must be those of these shards, this temperature and this teacher."""
    assert config.teacher.cache is not None
    if config.student.architecture != "decoder":
        raise ConfigError("teacher.cache holds next-token signals, which encoders have not - leave it out")
    loss = config.loss
    check_cache(
        Path(config.teacher.cache),
        shards,
        temperature=loss.temperature,
        divergences=[name for name in ("logit_kl", "reverse_kl", "jsd") if getattr(loss, name)],
        teacher_folder=teacher_folder,
    )
    return CachedSignals(Path(config.teacher.cache))


def open_rows(folder: str, rows: str) -> ShardSet:
    shards = open_shards(folder)
    if shards.manifest.rows != rows:
        students = "decoders read" if rows == "lm-blocks" else "relation distillation reads"
        raise DataError(
            f"data.shards: {folder} holds rows of kind {shards.manifest.rows} - {students} {rows} - "
            f"prepare them with --rows {rows}"
        )
    return shards


def check_losses(config: RunConfig) -> None:
    """The losses must be ones that this student has, and must have the teacher that they need."""
    loss, has_teacher = config.loss, config.teacher.model is not None
    if config.teacher.compile and config.student.architecture == "decoder":
        raise ConfigError("teacher.compile: a decoder asks in every forward where its documents end - set it to false")
    if config.student.architecture != "decoder":
        if not has_teacher:
            raise ConfigError("teacher.model is null - an encoder learns from a teacher alone - name one")
        return
    divergence = loss.logit_kl or loss.reverse_kl or loss.jsd
    if loss.hidden_cosine and (not has_teacher or config.teacher.cache):
        raise ConfigError("loss.hidden_cosine compares hidden states, which need a teacher.model and no teacher.cache")
    if not divergence and not loss.cross_entropy:
        raise ConfigError(
            "loss: a decoder has nothing to learn from - set loss.logit_kl (or reverse_kl, jsd), loss.cross_entropy, "
            "or both"
        )
    if divergence and not has_teacher and config.teacher.cache is None:
        raise ConfigError(
            "teacher.model is null, but loss.logit_kl, reverse_kl or jsd compares with a teacher - name one, or set "
            "loss.cross_entropy alone"
        )


def check_head(shards: ShardSet, model_config: dict[str, Any], what: str) -> None:
    """Every id of the shards must have a place in the model; places beyond them are padding (152064 of 151936)."""
    size, needed = model_config.get("vocab_size"), shards.manifest.tokenizer["vocab_size"]
    if size is not None and size < needed:
        raise DataError(
            f"{what} has vocab_size ({size}), but {shards.folder} was made with {needed} ids - ids beyond the end "
            "would be read from nowhere - use the model and tokenizer that belong together"
        )


def check_parallelism_of(config: RunConfig, settings: dict[str, Any], world_size: int, init_folder: Path | None) -> int:
    student = config.student
    num_experts = student.num_experts if student.architecture == "minimoe" else 1
    if student.architecture == "decoder" and init_folder:
        source = read_model_config(init_folder)
        num_experts = source.get("num_local_experts") or source.get("num_experts") or 1
    return check_parallelism(
        settings,
        expert_parallel_size=config.engine.expert_parallel_size,
        num_experts=num_experts,
        world_size=world_size,
        precision=config.engine.precision,
    )


def check_length(shards: ShardSet, teacher_config: dict[str, Any]) -> None:
    positions = teacher_config.get("max_position_embeddings")
    if positions is not None and shards.manifest.length > positions:
        raise DataError(
            f"data.shards: rows of {shards.manifest.length} tokens, but the teacher has {positions} positions - "
            "prepare shorter rows with --length"
        )


def check_own_code(config: RunConfig, teacher_config: dict[str, Any] | None) -> None:
    """Code that comes with a teacher runs only when the recipe says so."""
    if teacher_config and "auto_map" in teacher_config and not config.teacher.trust_remote_code:
        raise ConfigError(
            f"teacher.model {config.teacher.model} (auto_map of its config.json) runs Python code of its own, which "
            "could do anything - read its .py files, then set teacher.trust_remote_code true"
        )


def check_trust(config: RunConfig) -> None:
    name = config.teacher.model or "."
    is_local = name.startswith("package:") or Path(name).exists()
    if config.teacher.trust_remote_code and not is_local and config.teacher.revision is None:
        raise ConfigError(
            "teacher.trust_remote_code runs code from the hub - without a revision that code can change any day - "
            "pin teacher.revision to a commit"
        )


def check_vocabulary(shards: ShardSet, teacher_folder: Path) -> None:
    """Shards and teacher must map the same tokens to the same ids."""
    expected = shards.manifest.tokenizer["hash"]
    if tokenizer_hash(teacher_folder) == expected:
        return
    ours = folder_vocabulary(shards.folder / "tokenizer")
    theirs = folder_vocabulary(teacher_folder)
    differing = [token for token in sorted(ours, key=ours.__getitem__) if theirs.get(token) != ours[token]]
    if not differing:
        return  # The teacher knows tokens beyond ours, which no row holds.
    shown = ", ".join(f"{token!r} {ours[token]} -> {theirs.get(token)}" for token in differing[:5])
    raise DataError(
        f"tokenizer of {shards.folder} differs from the teacher's ({teacher_folder}): {len(differing)} of {len(ours)} "
        f"tokens ({shown}) - ids would mean other words - prepare the text again with --tokenizer {teacher_folder}"
    )


def check_relation_heads(config: RunConfig, teacher_config: dict[str, Any]) -> None:
    for side, width in (("teacher", teacher_config.get("hidden_size")), ("student", config.student.hidden_size)):
        if width is not None and config.loss.relation_kl and width % config.loss.num_relation_heads:
            raise ConfigError(
                f"loss.num_relation_heads ({config.loss.num_relation_heads}) does not divide the {side}'s width "
                f"({width}) - choose a common divisor of both widths"
            )


def check_hidden_layers(config: RunConfig, teacher_config: dict[str, Any], init_folder: Path | None) -> None:
    """Every layer of the student has its entry, and every entry is a layer of the teacher."""
    ours = config.student.num_hidden_layers
    if init_folder is not None:
        ours = read_model_config(init_folder)["num_hidden_layers"]
    layers, theirs = config.loss.hidden_layers or (), teacher_config["num_hidden_layers"]
    if len(layers) != ours or max(layers) > theirs:
        raise ConfigError(
            f"loss.hidden_layers ({list(layers)}) must give each of the student's {ours} layers a layer of the teacher "
            f"from 1 to {theirs}, or 0 for none"
        )


def check_init_layers(config: RunConfig, init_folder: Path | None) -> None:
    if init_folder is None:
        if config.student.init_layers is not None:
            raise ConfigError("student.init_layers is given without student.init_from - set init_from, or drop it")
        return
    source = read_model_config(init_folder)
    layers, available = config.student.init_layers, source.get("num_hidden_layers", 0)
    if layers is not None and (
        len(layers) != config.student.num_hidden_layers or not all(0 <= layer < available for layer in layers)
    ):
        raise ConfigError(
            f"student.init_layers ({list(layers)}) must name {config.student.num_hidden_layers} layers from 0 to "
            f"{available - 1} - {init_folder} has {available}"
        )
    if layers is None and available < config.student.num_hidden_layers:
        raise ConfigError(
            f"student.num_hidden_layers ({config.student.num_hidden_layers}) is more than student.init_from has "
            f"({available}) - name init_layers (one may come twice), or leave init_from out"
        )


def check_same_run(config: RunConfig, shards: ShardSet) -> None:
    """An output folder belongs to one config and one data set: going on with others would mix two runs."""
    for key, folder in (("out", config.out), ("checkpoint.copy_to", config.checkpoint.copy_to)):
        if folder is None or not (record := Path(folder) / "run.json").exists():
            continue
        before = read_json(record, f"the run's own record is damaged: restore it, or choose another {key}")
        differing = changed_keys(before.get("config", {}), asdict(config))
        if before.get("data_fingerprint") != shards.manifest.fingerprint:
            differing.append(f"the content of {config.data.shards}")
        if differing:
            raise ConfigError(
                f"{key}: {folder} belongs to a run with another config: {'; '.join(differing)} - "
                f"set them back, or choose another --{key}"
            )


def check_copies(config: RunConfig) -> None:
    if config.checkpoint.copy_to is None:
        return
    copies, out = Path(config.checkpoint.copy_to).resolve(), Path(config.out).resolve()
    if copies == out or out in copies.parents or copies in out.parents:
        raise ConfigError(
            f"checkpoint.copy_to ({config.checkpoint.copy_to}) and out ({config.out}) lie in each other - "
            "name a folder elsewhere, best on another disk"
        )


def check_port(port: int) -> None:
    if is_taken(port):
        raise ConfigError(
            f"port {port} is in use by another program - the ranks cannot meet there - give another, as in "
            f"deepspeed --master_port {port + 1}"
        )
