"""Exports load in a process that has never heard of this project, and compute what the student computed."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_prep.shards import tokenizer_hash
from launching import environment
from pipeline.config import StudentConfig
from pipeline.models.export import export_student
from pipeline.models.sizes import linear_macs, num_parameters
from pipeline.models.students import build_student
from pipeline.signals import Batch
from tiny_runs import VOCABULARY, write_tokenizer

TINY = {"vocab_size": len(VOCABULARY), "max_position_embeddings": 24}
SMALL = StudentConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=4, intermediate_size=24, num_experts=3)
STUDENTS = {
    "dense": replace(SMALL, architecture="dense"),
    "minimoe": SMALL,
    "minimoe with attention experts": replace(SMALL, num_attention_experts=2),
    "minimoe with selection biases": replace(SMALL, num_attention_experts=2, selection_bias_rate=0.001),
}

# Runs where the three packages cannot be imported, although the editable installation offers them.
FRESH_PROCESS = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pipeline", "data_prep", "capgap_kernels"):
            raise ModuleNotFoundError(f"blocked: {name}")

sys.meta_path.insert(0, Blocker())
try:
    import pipeline
except ModuleNotFoundError:
    pass
else:
    sys.exit("the blocker does not block")

from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer,
)

work = Path(sys.argv[1])
inputs = load_file(work / "inputs.safetensors")
for folder in sorted(path for path in work.iterdir() if path.is_dir() and (path / "config.json").exists()):
    trust = {} if folder.name == "dense" else {"trust_remote_code": True}
    found = {}
    model = AutoModel.from_pretrained(folder, **trust).eval()
    with torch.no_grad():
        found["hidden"] = model(**inputs).last_hidden_state
    assert AutoConfig.from_pretrained(folder, **trust).hidden_size == 16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("word1 word2").input_ids == [2, 6, 7, 3]
    for name, kind in (("sequence", AutoModelForSequenceClassification), ("token", AutoModelForTokenClassification)):
        tuned = kind.from_pretrained(folder, num_labels=3, **trust).train()
        encoder = getattr(tuned, tuned.base_model_prefix).state_dict()
        for key, weight in load_file(folder / "model.safetensors").items():
            assert weight.equal(encoder[key]), key
        rows, length = inputs["input_ids"].shape
        labels = torch.ones((rows,) if name == "sequence" else (rows, length), dtype=torch.long)
        optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
        losses = []
        for _ in range(8):
            output = tuned(**inputs, labels=labels)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            losses.append(float(output.loss))
        assert losses[-1] < losses[0], losses
        tuned.eval()
        tuned.save_pretrained(work / "tuned")
        again = kind.from_pretrained(work / "tuned", **trust).eval()
        with torch.no_grad():
            torch.testing.assert_close(again(**inputs).logits, tuned(**inputs).logits, atol=1e-6, rtol=1e-5)
            found[name] = tuned(**inputs).logits
    save_file({key: value.contiguous() for key, value in found.items()}, work / f"{folder.name}.found.safetensors")
assert not {"pipeline", "data_prep", "capgap_kernels"} & sys.modules.keys()
"""


@dataclass
class Exported:
    folder: Path
    student: Any
    found: dict[str, torch.Tensor]
    tokenizer: Path


def inputs() -> Batch:
    lengths = torch.tensor([[12], [7], [3]])
    positions = torch.arange(12)
    valid_BT = positions < lengths
    input_ids = torch.randint(5, len(VOCABULARY), (3, 12), generator=torch.Generator().manual_seed(1)) * valid_BT
    return Batch(input_ids, valid_BT, ((positions >= lengths // 2) & valid_BT).long())


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Exported]:
    """All three students exported, then loaded, fine-tuned and saved in one fresh process."""
    from safetensors.torch import save_file

    work = tmp_path_factory.mktemp("exports ü")
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    students = {}
    for name, config in STUDENTS.items():
        student = build_student(config, teacher_config=TINY, init_folder=None, seed=0)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            for key, buffer in student.named_buffers():
                if key.endswith("selection_bias"):
                    buffer.add_(torch.randn(buffer.shape, generator=generator))
        students[name] = student.eval()
        served = student.served_model()
        facts = {
            "name": name,
            "teacher": "some/teacher",
            "parameters": num_parameters(served),
            "macs": linear_macs(served, 12) / 1e9,
            "length": 12,
            "tokens": 123456,
        }
        export_student(work / name, served, student.backbone.state_dict(), tokenizer, facts)
    batch = inputs()
    assert batch.token_type_ids is not None
    segments, mask = batch.token_type_ids, batch.valid_BT.long()
    columns = {"input_ids": batch.input_ids, "attention_mask": mask, "token_type_ids": segments}
    save_file(columns, work / "inputs.safetensors")
    home = tmp_path_factory.mktemp("home")
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH_PROCESS, str(work)],
        cwd=home,
        env=environment(HF_HOME=str(home), HOME=str(home)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = {name: load_file(work / f"{name}.found.safetensors") for name in students}
    return {name: Exported(work / name, students[name], found[name], tokenizer) for name in students}


@pytest.mark.parametrize("name", [name for name in STUDENTS if name != "dense"])
def test_the_fresh_process_gets_the_students_hidden_states(exported, name):
    ours = exported[name].student(inputs()).hidden_states_BTD
    valid = inputs().valid_BT
    torch.testing.assert_close(exported[name].found["hidden"][valid], ours[valid], atol=1e-5, rtol=0)


def test_the_fresh_process_gets_the_dense_students_hidden_states(exported):
    batch, student = inputs(), exported["dense"].student
    ours = student.backbone(batch.input_ids, batch.valid_BT, batch.token_type_ids).last_hidden_state
    torch.testing.assert_close(
        exported["dense"].found["hidden"][batch.valid_BT], ours[batch.valid_BT], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", STUDENTS)
def test_classifiers_start_from_the_exported_encoder_learn_and_survive_saving(exported, name):
    """Checked inside the fresh process; here, that it came to the end."""
    assert exported[name].found["sequence"].shape == (3, 3)
    assert exported[name].found["token"].shape == (3, 12, 3)


@pytest.mark.parametrize("name", STUDENTS)
def test_the_weights_are_float32_safetensors_without_the_relation_head(exported, name):
    folder = exported[name].folder
    weights = load_file(folder / "model.safetensors")
    assert not [key for key in weights if "relation" in key or "backbone" in key]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    state = exported[name].student.backbone.state_dict()
    assert all(weights[key].equal(state[key]) for key in weights)
    served = exported[name].student.served_model()
    trained = [weights[key] for key, _ in served.named_parameters()]
    assert sum(tensor.numel() for tensor in trained) == num_parameters(served)
    assert weights.keys() == served.state_dict().keys()
    assert not [file for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize("name", STUDENTS)
def test_the_tokenizer_is_there_file_by_file_and_means_the_same_ids(exported, name):
    for file in exported[name].tokenizer.iterdir():
        assert (exported[name].folder / file.name).read_bytes() == file.read_bytes()
    assert tokenizer_hash(exported[name].folder) == tokenizer_hash(exported[name].tokenizer)


@pytest.mark.parametrize("name", STUDENTS)
def test_the_model_card_tells_the_truth(exported, name):
    folder, card = exported[name].folder, (exported[name].folder / "README.md").read_text(encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    parameters = sum(tensor.numel() for key, tensor in weights.items() if "selection_bias" not in key)
    assert f"{parameters:,} parameters" in card
    assert "`some/teacher`" in card and "123,456 training tokens" in card
    is_minimoe = name != "dense"
    assert ("trust_remote_code=True" in card) == is_minimoe
    assert ("2305.12129" in card) == is_minimoe
    assert "{" not in card.replace("{\n", "")


def test_only_minimoe_brings_code_and_it_is_flat(exported):
    assert not list(exported["dense"].folder.glob("*.py"))
    folder = exported["minimoe"].folder
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert set(config["auto_map"]) == {
        "AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
    }  # fmt: skip
    for target in config["auto_map"].values():
        module, _, name = target.partition(".")
        assert f"class {name}(" in (folder / f"{module}.py").read_text(encoding="utf-8")
    assert config["num_experts"] == 3 and "router_jitter" not in config


def test_exporting_again_replaces_the_folder_as_a_whole(exported, tmp_path):
    model = exported["minimoe"]
    served = model.student.served_model()
    facts = {"name": "x", "teacher": "t", "parameters": 1, "macs": 0.1, "length": 2, "tokens": 3}
    for _ in range(2):
        export_student(tmp_path / "export", served, model.student.backbone.state_dict(), model.tokenizer, facts)
        (tmp_path / "export" / "left.over").touch()
    export_student(tmp_path / "export", served, model.student.backbone.state_dict(), model.tokenizer, facts)
    assert not (tmp_path / "export" / "left.over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
