"""A teacher whose layers are cut over the ranks while they are read, so that no rank ever holds it whole."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data_prep.errors import DataError
from pipeline.config import TeacherConfig
from pipeline.model_files import ModelFiles
from pipeline.models.decoders import CausalTeacher, load_causal_teacher, outline_of_teacher


def load_sharded_teacher(
    folder: Path, config: TeacherConfig, *, dtype: torch.dtype, attention: str, device: torch.device
) -> CausalTeacher:
    """The frozen teacher at ZeRO 3: a rank holds its share of the layers, one whole layer at a time, and the head.

    Every rank must call this, and afterwards the teacher, equally often. Where the files name their tensors otherwise
    than the modules do (mixtures of experts), every rank first loads the whole teacher into its machine's memory.
    """
    import deepspeed

    model, files = outline_of_teacher(folder, config, dtype=dtype, attention=attention), ModelFiles(folder)
    teacher = CausalTeacher(model, micro_size=config.micro_size)
    prefix = f"{model.base_model_prefix}."
    largest = max(sum(weight.numel() for weight in piece.parameters()) for _, piece in pieces(teacher.body))
    zero = {"stage": 3, "stage3_param_persistence_threshold": 10_000}
    # A layer that computes and the next one that is fetched meanwhile; by default it would be a billion parameters.
    zero |= {"stage3_max_live_parameters": 2 * largest, "stage3_prefetch_bucket_size": largest}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**31,
        "zero_optimization": zero | {"stage3_max_reuse_distance": 0},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    on_disk = set(files)
    if all(prefix + name in on_disk for name, _ in teacher.body.named_parameters()):
        # A head that is the embedding has the embedding's name on disk; here it stays whole and becomes its own.
        names = {id(weight): name for name, weight in reversed([*model.named_parameters(remove_duplicate=False)])}
        wanted = {name: names[id(weight)] for name, weight in teacher.head.named_parameters()}
        teacher.head = copy.deepcopy(teacher.head)
        fill(teacher.head, wanted, files, device)
        for name, piece in pieces(teacher.body):
            wanted = {part: prefix + name + part for part, _ in piece.named_parameters()}
            fill(piece, wanted, files if dist.get_rank() == 0 else None, device)
            # Hands out what rank 0 holds, and keeps of it what is this rank's.
            deepspeed.zero.Init(module=piece, config_dict_or_path=settings)
    else:
        teacher = load_causal_teacher(folder, config, dtype=dtype, attention=attention)
        teacher.head = copy.deepcopy(teacher.head).to(device)
    teacher.body, *_ = deepspeed.initialize(model=teacher.body, config=settings)
    teacher.body.eval()
    return teacher


def pieces(body: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Embedding, each layer and last norm, with the beginning of their tensors' names."""
    for name, child in body.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{index}.", layer) for index, layer in enumerate(child))
        else:
            yield f"{name}.", child


def fill(module: nn.Module, names: dict[str, str], files: ModelFiles | None, device: torch.device) -> None:
    """Gives an outline's parameters memory on the device, with the tensors of the files under `names` in it."""
    for name, outline in list(module.named_parameters()):
        weight = torch.empty(outline.shape, dtype=outline.dtype, device=device)
        if files is not None:
            found = files[names[name]]
            if found.shape != outline.shape:
                raise DataError(
                    f"teacher.model: {names[name]} in {files.folder} has shape {tuple(found.shape)}, its config.json "
                    f"says {tuple(outline.shape)} - copy or download the folder again"
                )
            weight.copy_(found)
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, nn.Parameter(weight, requires_grad=False))
