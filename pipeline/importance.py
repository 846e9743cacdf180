"""How much the parts of a decoder matter on calibration rows: one layer and one batch in memory, the rest in files."""

from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from capgap_kernels import linear_kl
from data_prep.errors import DataError
from data_prep.files import file_hash, make_folder, read_json, remove_folder, require_free_space, write_json
from data_prep.progress import Progress
from data_prep.shards import ShardSet
from pipeline.batches import decoder_batch
from pipeline.model_files import ModelFiles
from pipeline.signals import Batch
from pipeline.state_files import write_tensors

# B rows, T tokens of a row, D hidden width


@dataclass(frozen=True)
class Calibration:
    """What is measured, and on what."""

    importance: Literal["activation", "taylor"]
    rows: int
    length: int
    batch_rows: int


@dataclass
class Importance:
    """How much each unit matters: larger is more."""

    layers: list[float]
    hidden: Tensor  # [D]
    heads: dict[int, Tensor] = field(default_factory=dict)  # by layer, [heads]
    neurons: dict[int, Tensor] = field(default_factory=dict)  # by layer, [neurons]


class Notes:
    """What goes in and comes out of each layer, in files, so that a killed measurement goes on with the next layer.

    `notes.json` is written after each layer: how many of each pass are done, what has been found, and the hashes of
    the files that are still to be read.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any]):
        self.folder, self.made_from = folder, made_from
        self.done: dict[str, int] = {}
        self.hashes: dict[str, str] = {}
        self.found: dict[str, Any] | None = None
        record = folder / "notes.json"
        before = read_json(record, f"remove {folder}") if record.exists() else {}
        if before.get("made_from") == made_from:
            self.done, self.hashes, self.found = before["done"], before["hashes"], before["found"]
        elif folder.exists():
            remove_folder(folder)
        make_folder(folder)

    def put(self, name: str, states_BTD: Tensor) -> None:
        self.hashes[name] = write_tensors(self.folder / f"{name}.safetensors", {"states": states_BTD}, {})

    def get(self, name: str) -> Tensor:
        path = self.folder / f"{name}.safetensors"
        if not path.is_file() or file_hash(path) != self.hashes[name]:
            raise DataError(f"reading {path}: missing or damaged - remove {self.folder}, then run the command again")
        return load_file(path)["states"]

    def importance(self, num_layers: int, width: int) -> Importance:
        """What has been found so far."""
        if self.found is None:
            return Importance([0.0] * num_layers, torch.zeros(width))
        units = {
            kind: {int(layer): torch.tensor(values) for layer, values in self.found[kind].items()}
            for kind in ("heads", "neurons")
        }
        return Importance(self.found["layers"], torch.tensor(self.found["hidden"]), **units)

    def finish(self, name: str, num_layers: int, found: Importance, *, drop: tuple[str, ...] = ()) -> None:
        """Notes that `num_layers` of a pass are done; files whose names begin like one of `drop` will not be read."""
        self.done[name] = num_layers
        self.found = {
            "layers": found.layers,
            "hidden": found.hidden.tolist(),
            "heads": {layer: values.tolist() for layer, values in found.heads.items()},
            "neurons": {layer: values.tolist() for layer, values in found.neurons.items()},
        }
        dropped = [file for file in self.hashes if file.startswith(drop)]
        self.hashes = {file: digest for file, digest in self.hashes.items() if file not in dropped}
        record = {"made_from": self.made_from, "done": self.done, "hashes": self.hashes, "found": self.found}
        write_json(self.folder / "notes.json", record)
        for file in dropped:
            (self.folder / f"{file}.safetensors").unlink(missing_ok=True)


def measure(calibration: Calibration, source: ModelFiles, dense: Any, shards: ShardSet, notes: Notes) -> Importance:
    """Runs calibration rows through the layers, forward and for taylor backward; goes on where `notes` end."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = calibration_batches(calibration, shards)
    num_layers, backward = dense.num_hidden_layers, calibration.importance == "taylor"
    found = notes.importance(num_layers, dense.hidden_size)
    size = 4 * dense.hidden_size * sum(batch.input_ids.numel() for batch in batches)
    if not notes.done:
        require_free_space(notes.folder, size * (num_layers + 3 if backward else 3))
        embedding = source["model.embed_tokens.weight"]
        for number, batch in enumerate(batches):
            notes.put(f"state-0-{number}", embedding[batch.input_ids].float())
        del embedding
        notes.finish("forward", 0, found)
    runner = LayerRunner(source, dense, device)
    done = notes.done["forward"], notes.done.get("backward", 0)
    with Progress("importance", (1 + backward) * num_layers, unit="layers", start=sum(done)) as progress:
        for index in range(done[0], num_layers):
            runner.load(index)
            if backward:
                for number, batch in enumerate(batches):
                    with torch.no_grad():
                        notes.put(
                            f"state-{index + 1}-{number}", runner(notes.get(f"state-{index}-{number}"), batch).cpu()
                        )
            else:
                activations_of_layer(runner, batches, notes, found, index)
            notes.finish("forward", index + 1, found, drop=() if backward else (f"state-{index}-",))
            progress.advance()
        if backward and "backward" not in notes.done:
            loss_gradients(source, dense, batches, notes, device)
            notes.finish("backward", 0, found, drop=(f"state-{num_layers}-",))
        for index in reversed(range(num_layers - done[1] if backward else 0)):
            runner.load(index)
            taylor_of_layer(runner, batches, notes, found, index)
            notes.finish("backward", num_layers - index, found, drop=(f"gradient-{index + 1}-", f"state-{index}-"))
            progress.advance()
    return found


def calibration_batches(calibration: Calibration, shards: ShardSet) -> list[Batch]:
    """The first tokens of rows that lie evenly over the whole set."""
    count = min(calibration.rows, len(shards))
    batches = []
    for start in range(0, count, calibration.batch_rows):
        stop = min(start + calibration.batch_rows, count)
        columns = shards.read(np.arange(start, stop) * len(shards) // count)
        cut = {
            "input_ids": columns["input_ids"][:, : calibration.length],
            "length": columns["length"].clip(max=calibration.length),
            "document_index": columns["document_index"][:, : calibration.length],
        }
        batches.append(decoder_batch(cut))
    return batches


class LayerRunner:
    """A decoder of one layer, whose weights are exchanged; it does what the whole model does around a layer."""

    def __init__(self, source: ModelFiles, dense: Any, device: torch.device):
        from transformers import AutoModelForCausalLM

        shape = deepcopy(dense)
        # Hidden states go in and come out: no embedding is needed, and no norm at the end.
        shape.num_hidden_layers, shape.vocab_size, shape.pad_token_id = 1, 1, None
        if getattr(shape, "layer_types", None):
            shape.layer_types = shape.layer_types[:1]
        self.model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).model.to(device).eval()
        self.model.norm = nn.Identity()
        self.model.requires_grad_(False)
        self.source, self.device = source, device
        self.layer = self.model.layers[0]

    def load(self, index: int) -> None:
        for name, weight in self.layer.named_parameters():
            weight.copy_(self.source[f"model.layers.{index}.{name}"])

    def __call__(self, hidden_BTD: Tensor, batch: Batch) -> Tensor:
        assert batch.position_ids is not None
        positions = batch.position_ids.to(self.device)
        hidden_BTD = hidden_BTD.to(self.device)
        return self.model(inputs_embeds=hidden_BTD, position_ids=positions, use_cache=False).last_hidden_state

    def watched(self, seen: dict[str, Tensor], *, keep_gradient: bool = False) -> ExitStack:
        """While it is open, what goes into o_proj and down_proj and comes out of the norms is put into `seen`."""

        def remember(name: str, tensor: Tensor) -> None:
            if keep_gradient:
                tensor.retain_grad()
            seen[name] = tensor

        hooks = ExitStack()
        for name, module in (("heads", self.layer.self_attn.o_proj), ("neurons", self.layer.mlp.down_proj)):
            handle = module.register_forward_pre_hook(lambda _, given, name=name: remember(name, given[0]))
            hooks.callback(handle.remove)
        for name in ("input_layernorm", "post_attention_layernorm"):
            handle = getattr(self.layer, name).register_forward_hook(lambda _, __, out, name=name: remember(name, out))
            hooks.callback(handle.remove)
        return hooks


def per_head(values_C: Tensor, num_heads: int) -> Tensor:
    """[heads] root of the summed squares over the channels of each head."""
    return values_C.view(num_heads, -1).square().sum(1).sqrt()


def activations_of_layer(
    runner: LayerRunner, batches: list[Batch], notes: Notes, found: Importance, index: int
) -> None:
    """Runs a layer forward and adds the mean sizes of its units."""
    heads: Any = 0
    neurons: Any = 0
    num_tokens, change = 0, 0.0
    for number, batch in enumerate(batches):
        seen: dict[str, Tensor] = {}
        state = notes.get(f"state-{index}-{number}")
        with torch.no_grad(), runner.watched(seen):
            output = runner(state, batch).cpu()
        valid = batch.valid_BT
        num_tokens += int(valid.sum())
        sizes = {name: tensor.abs().cpu()[valid].sum(0) for name, tensor in seen.items()}
        heads, neurons = heads + sizes["heads"], neurons + sizes["neurons"]
        found.hidden += sizes["input_layernorm"] + sizes["post_attention_layernorm"]
        similar = nn.functional.cosine_similarity(state[valid], output[valid], dim=-1)
        change += float((1 - similar).sum())
        notes.put(f"state-{index + 1}-{number}", output)
    # A unit counts with what it hands on: its size times that of its outgoing weights.
    outgoing = runner.layer.self_attn.o_proj.weight.norm(dim=0).cpu()
    found.heads[index] = per_head(heads / num_tokens * outgoing, runner.model.config.num_attention_heads)
    found.neurons[index] = neurons / num_tokens * runner.layer.mlp.down_proj.weight.norm(dim=0).cpu()
    found.layers[index] = change / num_tokens


def loss_gradients(source: ModelFiles, dense: Any, batches: list[Batch], notes: Notes, device: torch.device) -> None:
    """Writes the gradients of the cross-entropy by the hidden states after the last layer."""
    last = dense.num_hidden_layers
    head_name = "model.embed_tokens.weight" if dense.tie_word_embeddings else "lm_head.weight"
    head_VD, norm_D = source[head_name].float().to(device), source["model.norm.weight"].float().to(device)
    for number, batch in enumerate(batches):
        hidden = notes.get(f"state-{last}-{number}").to(device).requires_grad_()
        normed = hidden * (hidden.square().mean(-1, keepdim=True) + dense.rms_norm_eps).rsqrt() * norm_D
        assert batch.labels_BT is not None
        labels = batch.labels_BT.flatten().to(device)
        linear_kl(
            normed.flatten(0, 1), head_VD, None, labels_N=labels, kl_weight=0.0, ce_weight=1.0
        ).loss_sum.backward()
        assert hidden.grad is not None
        notes.put(f"gradient-{last}-{number}", hidden.grad)


def taylor_of_layer(runner: LayerRunner, batches: list[Batch], notes: Notes, found: Importance, index: int) -> None:
    """Runs a layer again with gradients, adds |unit * gradient| and writes the gradients by the states before it."""
    heads: Any = 0
    neurons: Any = 0
    for number, batch in enumerate(batches):
        gradient = notes.get(f"gradient-{index + 1}-{number}")
        seen: dict[str, Tensor] = {}
        entering = notes.get(f"state-{index}-{number}").to(runner.device).requires_grad_()
        with runner.watched(seen, keep_gradient=True):
            output = runner(entering, batch)
            output.backward(gradient.to(runner.device))
        valid = batch.valid_BT
        # Summed over a unit's channels before the absolute value: the loss's change when the whole unit goes.
        effect = {name: times_gradient(tensor).cpu()[valid] for name, tensor in seen.items()}
        by_head = effect["heads"].unflatten(-1, (runner.model.config.num_attention_heads, -1)).sum(-1)
        heads, neurons = heads + by_head.abs().sum(0), neurons + effect["neurons"].abs().sum(0)
        found.hidden += sum(effect[name].abs().sum(0) for name in ("input_layernorm", "post_attention_layernorm"))
        moved = (output.detach() - entering.detach()).cpu()[valid]
        found.layers[index] += float((moved * gradient[valid]).sum(-1).abs().sum())
        assert entering.grad is not None
        notes.put(f"gradient-{index}-{number}", entering.grad)
    found.heads[index], found.neurons[index] = heads, neurons


def times_gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.detach() * tensor.grad
