"""Builds the models of a run and says what the run will need."""

import os
from pathlib import Path
from typing import Any

from data_prep.errors import ConfigError
from data_prep.files import require_free_space
from pipeline.config import RunConfig
from pipeline.preflight import Checked, Problems


def print_plan(config: RunConfig, checked: Checked, world_size: int) -> None:
    """Prints the resolved config, sizes, tokens per step and the memory estimate."""
    import torch
    from omegaconf import OmegaConf

    from pipeline.models.sizes import checkpoint_bytes, estimate_memory

    print(OmegaConf.to_yaml(OmegaConf.structured(config)).rstrip())
    student, teacher = build_models(config, checked)
    length = checked.shards.manifest.length
    for name, sizes in describe(config, checked, student, teacher).items():
        print(f"{name}: {sizes}")
    per_step = config.batch.global_size * length
    print(
        f"steps: {checked.num_steps}, each {config.batch.global_size} rows x {length} = {per_step} tokens "
        f"({per_step * checked.shards.manifest.utilisation:.0f} valid), {world_size} ranks x "
        f"{checked.accumulation_steps} accumulation steps x {config.batch.micro_size} rows"
    )
    memory = estimate_memory(
        student,
        teacher,
        config,
        zero_stage=checked.zero_stage,
        world_size=world_size,
        length=length,
        on_gpu=torch.cuda.is_available(),
    )
    print(f"memory per rank (estimate): {memory}")
    print(f"disk per checkpoint (estimate): {checkpoint_bytes(student) / 2**20:.0f} MiB")


def build_models(config: RunConfig, checked: Checked) -> tuple[Any, Any]:
    """Student and frozen teacher on the CPU: encoders with their weights, of decoders only the outlines.

    A run that cannot fit is refused before a decoder's weights are read; `load_models` reads them.
    """
    import torch
    import transformers

    from pipeline.models.decoders import CachedTeacher, CausalTeacher, NoTeacher, outline_of_teacher
    from pipeline.models.students import build_student
    from pipeline.models.teachers import load_teacher

    # A dense encoder has no pooler and says so at length; a missing weight that matters is an error of ours.
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    if config.student.architecture == "decoder":
        decoder = decoder_student(config, checked, is_outline=True)
        if checked.cache is not None:
            return decoder, CachedTeacher(checked.cache.manifest)
        if checked.teacher_folder is None:
            return decoder, NoTeacher()
        outline = outline_of_teacher(
            checked.teacher_folder, config.teacher, dtype=dtype, attention=config.engine.attention
        )
        return decoder, CausalTeacher(outline, micro_size=config.teacher.micro_size)
    student = build_student(
        config.student, teacher_config=checked.teacher_config, init_folder=checked.init_folder, seed=config.seed
    )
    assert checked.teacher_folder is not None
    return student, load_teacher(checked.teacher_folder, config.teacher, dtype=dtype)


def decoder_student(config: RunConfig, checked: Checked, *, is_outline: bool) -> Any:
    from pipeline.models.decoders import build_decoder

    return build_decoder(
        config.student,
        checked.shards.manifest,
        init_folder=checked.init_folder,
        seed=config.seed,
        attention=config.engine.attention,
        teacher_width=checked.teacher_config["hidden_size"] if config.loss.hidden_cosine else None,
        compared_layers=config.loss.compared_layers[0],
        is_outline=is_outline,
    )


def load_models(
    config: RunConfig, checked: Checked, student: Any, teacher: Any, device: Any, *, is_sharded: bool
) -> tuple[Any, Any]:
    """The student with its weights and the teacher on this rank's device, or its layers sharded over the ranks."""
    if config.student.architecture == "decoder":
        student = decoder_student(config, checked, is_outline=False)
    return student, _load_teacher(config, checked, teacher, device, is_sharded=is_sharded)


def _load_teacher(config: RunConfig, checked: Checked, teacher: Any, device: Any, *, is_sharded: bool) -> Any:
    import torch

    from pipeline.models.decoders import CausalTeacher, load_causal_teacher
    from pipeline.models.sharded_teacher import load_sharded_teacher

    if not isinstance(teacher, CausalTeacher):
        return teacher.to(device)
    assert checked.teacher_folder is not None
    options: dict[str, Any] = {
        "dtype": torch.bfloat16 if config.engine.precision == "bf16" else torch.float32,
        "attention": config.engine.attention,
    }
    if is_sharded:
        teacher = load_sharded_teacher(checked.teacher_folder, config.teacher, **options, device=device)
    else:
        teacher = load_causal_teacher(checked.teacher_folder, config.teacher, **options, device=device)
    teacher.compared_layers = config.loss.compared_layers[1]
    return teacher


def describe(config: RunConfig, checked: Checked, student: Any, teacher: Any) -> dict[str, dict[str, Any]]:
    """Sizes of student and teacher, as run.json and the report show them."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from pipeline.models.sizes import linear_macs, num_active_parameters, num_parameters

    length = checked.shards.manifest.length
    served = student.served_model()
    sizes: dict[str, dict[str, Any]] = {
        "student": {
            "name": config.student.architecture,
            "parameters_training": num_parameters(student),
            "parameters_served": num_parameters(served),
            "parameters_active": num_active_parameters(served),
            "linear_macs_per_sequence": linear_macs(served, length),
            "sequence_length": length,
        }
    }
    if checked.teacher_folder is not None:
        # An encoder was cut at its relation layer; its size is that of the whole model.
        loader = AutoModelForCausalLM if config.student.architecture == "decoder" else AutoModel
        with torch.device("meta"):
            whole = loader.from_config(
                AutoConfig.from_pretrained(checked.teacher_folder, trust_remote_code=config.teacher.trust_remote_code)
            )
        # Students have no pooler: counting the teacher's would compare unlike things.
        if hasattr(whole, "pooler"):
            whole.pooler = None
        sizes["teacher"] = {
            "name": config.teacher.model,
            "parameters_served": num_parameters(whole),
            "linear_macs_per_sequence": linear_macs(getattr(whole, "encoder", whole), length),
            "sequence_length": length,
        }
    return sizes


def require_resources(config: RunConfig, checked: Checked, student: Any, teacher: Any, world_size: int) -> bool:
    """Refuses a run that cannot fit: memory of this machine's ranks, and disk for two checkpoints.

    Call it before the models are moved. Returns whether the teacher is to be sharded over the ranks.
    """
    from pipeline.models.sizes import checkpoint_bytes

    problems = Problems()
    problems.none_in(require_free_space, Path(config.out), 2 * checkpoint_bytes(student))
    is_sharded = problems.none_in(_fitting_placement, config, checked, student, teacher, world_size)
    problems.raise_if_any()
    return bool(is_sharded)


def _fitting_placement(config: RunConfig, checked: Checked, student: Any, teacher: Any, world_size: int) -> bool:
    """Whether the teacher must be sharded for a rank to fit into the free memory; ConfigError when it cannot."""
    import psutil
    import torch

    from pipeline.models.decoders import CausalTeacher
    from pipeline.models.sizes import estimate_memory

    on_gpu = torch.cuda.is_available()
    # CPU ranks share their machine's memory; srun does not say how many they are there.
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available // sharing
    can_shard = world_size > 1 and isinstance(teacher, CausalTeacher)
    choices = {"auto": [False, True] if can_shard else [False], "resident": [False], "sharded": [can_shard]}
    for is_sharded in choices[config.teacher.placement]:
        need = estimate_memory(
            student,
            teacher,
            config,
            zero_stage=checked.zero_stage,
            world_size=world_size,
            length=checked.shards.manifest.length,
            on_gpu=on_gpu,
            teacher_shards=world_size if is_sharded else 1,
        )
        if need.total <= free:
            return is_sharded
    raise ConfigError(
        f"batch.micro_size ({config.batch.micro_size}): a rank needs about {need}, {free / 2**20:.0f} MiB are free - "
        f"in this order: {', '.join(memory_mends(config, checked.zero_stage))}"
    )


def memory_mends(config: RunConfig, zero_stage: int) -> list[str]:
    """The first three things to change, the cheapest first, of those that are not done yet."""
    is_decoder = config.student.architecture == "decoder"
    mends = {
        "halve batch.micro_size": config.batch.micro_size > 1,
        "set engine.activation_checkpointing true": not config.engine.activation_checkpointing,
        "use teacher.cache (capgap cache)": is_decoder and config.teacher.model and config.teacher.cache is None,
        "use engine.ds_config ds_configs/zero2.json": zero_stage < 2,
        "use engine.ds_config ds_configs/zero3.json": zero_stage < 3,
        "use engine.ds_config ds_configs/zero3_offload.json": "offload" not in config.engine.ds_config,
        "use more ranks": True,
        "choose a smaller student": True,
    }
    return [mend for mend, helps in mends.items() if helps][:3]
