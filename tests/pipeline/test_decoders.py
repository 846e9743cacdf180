"""Decoders: packed documents, losses from hidden states, vocabulary checks, and the folder that is exported."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep.errors import CapgapError, ConfigError
from data_prep.shards import open_shards
from pipeline.batches import decoder_batch
from pipeline.config import LossConfig, load_run_config
from pipeline.losses import active_losses, compute_losses, distillation_share, needs_teacher
from pipeline.models.decoders import CausalTeacher, DecoderStudent, build_decoder, check_logits
from pipeline.models.export import export_decoder
from pipeline.models.sizes import num_active_parameters, num_parameters
from pipeline.preflight import check_run
from tiny_decoders import EOS, RECIPE, WORDS, build_model, write_blocks, write_decoder, write_word_tokenizer

KINDS = ["llama", "mistral", "qwen3", "mixtral", "qwen3_moe"]
# (row, first, end) of the documents below; the last five tokens of the second row are padding.
DOCUMENTS = [(0, 0, 7), (0, 7, 15), (0, 15, 16), (0, 16, 24), (1, 0, 3), (1, 3, 19)]


def packed_columns() -> dict[str, np.ndarray]:
    input_ids = np.random.default_rng(0).integers(4, len(WORDS), (2, 24)).astype(np.uint16)
    document_index = np.zeros((2, 24), np.uint16)
    for start in (7, 15, 16):
        document_index[0, start:] += 1
    document_index[1, 3:] = 1
    return {"input_ids": input_ids, "length": np.array([24, 19], np.uint8), "document_index": document_index}


@pytest.fixture
def batch():
    return decoder_batch(packed_columns())


def test_labels_stop_at_the_end_of_a_document_and_positions_begin_anew(batch):
    ids = batch.input_ids
    for row, first, end in DOCUMENTS:
        assert batch.labels_BT[row, first : end - 1].equal(ids[row, first + 1 : end])
        assert batch.labels_BT[row, end - 1] == -1
        assert batch.position_ids[row, first:end].tolist() == list(range(end - first))
    assert int(batch.valid_BT.sum()) == 6 + 7 + 0 + 7 + 2 + 15 == int((batch.labels_BT >= 0).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_gives_the_logits_of_its_documents_alone(kind, batch):
    student = DecoderStudent(build_model(kind), num_ids=len(WORDS))
    with torch.no_grad():
        seen = student(batch)
        logits_BTV = seen.hidden_states_BTD @ seen.head_VD.T
        for row, first, end in DOCUMENTS:
            alone_TV = student.backbone(batch.input_ids[row : row + 1, first:end]).logits[0]
            torch.testing.assert_close(logits_BTV[row, first:end], alone_TV, atol=1e-5, rtol=0)


def test_every_attention_keeps_documents_apart(tmp_path, batch):
    from pipeline.config import StudentConfig

    folder = write_decoder(tmp_path / "model", "mixtral")
    manifest = open_shards(write_blocks(tmp_path / "rows", rows=2)).manifest
    config = StudentConfig(architecture="decoder", init_from=str(folder))
    outputs = []
    for attention in ("sdpa", "eager"):
        student = build_decoder(config, manifest, init_folder=folder, seed=0, attention=attention)
        assert student.backbone.config._attn_implementation == attention
        with torch.no_grad():
            outputs.append(student(batch).hidden_states_BTD)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["logit_kl", "reverse_kl", "jsd"])
def test_the_loss_and_its_gradient_are_those_of_full_logits_over_the_real_ids(name, batch):
    """The teacher's head has eleven places of padding, the student's none."""
    student = DecoderStudent(build_model("llama"), num_ids=len(WORDS))
    teacher = CausalTeacher(build_model("llama", seed=1, num_hidden_layers=3, vocab_size=112), micro_size=1)
    config = LossConfig(**{name: 0.7}, cross_entropy=0.3, temperature=2.0)
    weights = active_losses(config, has_routers=False, is_decoder=True)
    seen = student(batch)
    losses = compute_losses(weights, seen, teacher(batch), config)
    losses.total.backward()
    ours = {key: parameter.grad.clone() for key, parameter in student.named_parameters()}
    student.zero_grad()

    valid = batch.valid_BT
    logits = student(batch).hidden_states_BTD[valid] @ student.backbone.lm_head.weight.T
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        teacher_logits = teacher.head(teacher.body(**inputs).last_hidden_state)[valid][:, : len(WORDS)]
    log_q, log_p = (logits / 2).log_softmax(-1), (teacher_logits / 2).log_softmax(-1)
    mixed = torch.logaddexp(log_p, log_q) - np.log(2)
    expected = {
        "logit_kl": (log_p.exp() * (log_p - log_q)).sum(),
        "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(),
        "jsd": 0.5 * ((log_p.exp() * (log_p - mixed)).sum() + (log_q.exp() * (log_q - mixed)).sum()),
    }[name]
    cross_entropy = F.cross_entropy(logits, batch.labels_BT[valid], reduction="sum")
    (0.7 * expected + 0.3 * cross_entropy).backward()
    torch.testing.assert_close(losses.parts[name], expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses.parts["cross_entropy"], cross_entropy.detach(), rtol=1e-4, atol=1e-4)
    for key, parameter in student.named_parameters():
        torch.testing.assert_close(ours[key], parameter.grad, rtol=1e-3, atol=1e-3, msg=key)


def test_hidden_states_are_compared_in_the_teachers_width(batch):
    student = DecoderStudent(build_model("llama"), num_ids=len(WORDS), teacher_width=40)
    teacher = CausalTeacher(build_model("llama", seed=1, hidden_size=40))
    config = LossConfig(hidden_cosine=2.0)
    weights = active_losses(config, has_routers=False, is_decoder=True)
    seen, said = student(batch), teacher(batch)
    losses = compute_losses(weights, seen, said, config)
    valid, (linear,) = batch.valid_BT, student.to_teacher
    ours = linear(seen.hidden_states_BTD)[valid]
    expected = (1 - F.cosine_similarity(ours, said.hidden_states_BTD[valid], dim=-1)).sum()
    torch.testing.assert_close(losses.parts["hidden_cosine"], expected)
    torch.testing.assert_close(losses.total, 2 * expected)
    losses.total.backward()
    assert linear.weight.grad.any() and not any("to_teacher" in name for name, _ in student.backbone.named_parameters())


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_are_compared_with_the_layers_that_the_recipe_names(batch, recompute):
    config = LossConfig(hidden_cosine=1.0, hidden_layers=(1, 0, 3))
    ours, theirs = config.compared_layers
    assert (ours, theirs) == ((1, 3), (1, 3))
    backbone = build_model("mixtral", num_hidden_layers=3)
    student = DecoderStudent(backbone, num_ids=len(WORDS), teacher_width=40, compared_layers=ours).train()
    if recompute:
        backbone.gradient_checkpointing_enable()
    model = build_model("llama", seed=1, hidden_size=40, num_hidden_layers=3)
    teacher = CausalTeacher(model, micro_size=1, compared_layers=theirs)
    losses = compute_losses({"hidden_cosine": 1.0}, student(batch), teacher(batch), config)
    losses.total.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in student.named_parameters() if parameter.grad is not None
    }
    student.zero_grad()

    # transformers' own hidden states: the first is the embedding, the last one is normed.
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    backbone.gradient_checkpointing_disable()
    before_norm = []
    backbone.model.norm.register_forward_pre_hook(lambda _, given: before_norm.append(given[0]))
    model.model.norm.register_forward_pre_hook(lambda _, given: before_norm.append(given[0]))
    states = [backbone.model(**inputs, output_hidden_states=True).hidden_states[1]]
    with torch.no_grad():
        goals = [model.model(**inputs, output_hidden_states=True).hidden_states[1]]
    states, goals = [states[0], before_norm[0]], [goals[0], before_norm[1]]
    expected = 0
    for linear, state, goal in zip(student.to_teacher, states, goals, strict=True):
        expected += (1 - F.cosine_similarity(linear(state), goal, dim=-1))[batch.valid_BT].sum() / 2
    torch.testing.assert_close(losses.parts["hidden_cosine"], expected)
    expected.backward()
    assert any("experts" in name for name in gradients) and any("to_teacher.1" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, student.get_parameter(name).grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_routers_report_the_tokens_that_count_and_a_gradient(kind, batch):
    student = DecoderStudent(build_model(kind), num_ids=len(WORDS))
    seen = student(batch)
    assert list(seen.routers) == ["layers.0.mlp", "layers.1.mlp"][-len(seen.routers) :]
    for router in seen.routers.values():
        assert int(router.tokens_per_expert_E.sum()) == 2 * int(batch.valid_BT.sum())
        assert float(router.gate_sum_E.sum().detach()) == pytest.approx(int(batch.valid_BT.sum()))
    (sum(router.z_loss_sum for router in seen.routers.values())).backward()
    gates = [p for name, p in student.named_parameters() if name.endswith("mlp.gate.weight")]
    assert len(gates) == len(seen.routers) and all(gate.grad is not None and gate.grad.any() for gate in gates)


def test_rotary_frequencies_stay_exact_in_bf16():
    student = DecoderStudent(build_model("llama"), num_ids=len(WORDS))
    exact = student.backbone.model.rotary_emb.inv_freq.clone()
    student.bfloat16()
    assert student.backbone.lm_head.weight.dtype == torch.bfloat16
    assert student.backbone.model.rotary_emb.inv_freq.equal(exact)


def test_what_a_schedule_takes_from_the_teacher_the_text_gains():
    config = LossConfig(logit_kl=0.6, cross_entropy=0.4, distillation_schedule="wsd", distillation_hold=0.5)
    assert [distillation_share(config, part) for part in (0.0, 0.49, 0.75)] == [1.0, 1.0, 0.5]
    weights = active_losses(config, has_routers=False, is_decoder=True, progress=0.75)
    assert weights == pytest.approx({"logit_kl": 0.3, "cross_entropy": 0.7})
    stopped = LossConfig(jsd=1.0, distillation_schedule="stop", distillation_hold=0.5)
    weights = active_losses(stopped, has_routers=False, is_decoder=True, progress=0.5)
    assert weights == {"cross_entropy": 1.0} and not needs_teacher(weights)


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", False), ("llama", True), ("mixtral", False), ("qwen3_moe", False)]
)
def test_the_export_loads_generates_and_gives_the_logits_of_the_training_model(kind, tied, tmp_path, batch):
    student = DecoderStudent(build_model(kind, tie_word_embeddings=tied), num_ids=len(WORDS))
    facts = {"name": "x", "teacher": None, "parameters": 1, "active": 1, "length": 24, "tokens": 1, "macs": 1}
    tokenizer = write_word_tokenizer(tmp_path / "tokenizer")
    state = {name: value.detach().clone() for name, value in student.backbone.named_parameters()}
    with torch.no_grad():
        expected = student.backbone(batch.input_ids).logits
    export_decoder(tmp_path / "out", student.served_model(), state, tokenizer, facts | {"precision": "fp32"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert model(batch.input_ids).logits.equal(expected)
    assert "vllm serve" in (tmp_path / "out" / "README.md").read_text()
    # transformers 4 looks for the rotary base here; every architecture has another default.
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == model.config.rope_parameters["rope_theta"]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("word1 word2", return_tensors="pt")["input_ids"]
    assert model.generate(tokens, max_new_tokens=2).shape[1] > 2


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_meet():
    model = build_model("mixtral")
    one_expert = 3 * 32 * 48
    assert num_active_parameters(model) == num_parameters(model) - 2 * 2 * one_expert


def test_a_model_that_bends_its_logits_is_refused():
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        check_logits(SimpleNamespace(model_type="gemma2", final_logit_softcapping=30.0), "teacher.model")
    check_logits(SimpleNamespace(model_type="granite", logits_scaling=1.0), "teacher.model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    write_decoder(root / "teacher", vocab_size=112)
    write_decoder(root / "student", "mixtral")
    write_decoder(root / "small", vocab_size=100)
    write_decoder(root / "other")
    write_word_tokenizer(root / "other", [*WORDS[:4], *WORDS[5:], WORDS[4]])
    write_decoder(root / "more", vocab_size=112)
    write_word_tokenizer(root / "more", [*WORDS, "extra"])
    write_blocks(root / "rows")
    return root


def checked(folders, tmp_path, *flags: str):
    recipe = tmp_path / "recipe.yaml"
    names = {name: folders / name for name in ("teacher", "student")}
    recipe.write_text(RECIPE.format(out=tmp_path / "run", shards=folders / "rows", **names))
    return check_run(load_run_config(recipe, list(flags)), 1)


ROW_16 = pytest.mark.fault(16)


@ROW_16
def test_padded_and_longer_vocabularies_are_read_up_to_the_shards_last_id(folders, tmp_path):
    assert checked(folders, tmp_path).shards.manifest.tokenizer["vocab_size"] == len(WORDS)
    assert checked(folders, tmp_path, "--teacher.model", str(folders / "more")).teacher_config["vocab_size"] == 112


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        pytest.param(["--teacher.model", "{}/other"], ["97 of 101", "'word0' 4 -> 100"], marks=ROW_16),
        pytest.param(["--teacher.model", "{}/small"], ["teacher.model", "vocab_size (100)", "101 ids"], marks=ROW_16),
        pytest.param(["--student.init_from", "{}/small"], ["student.init_from", "vocab_size (100)"], marks=ROW_16),
        (["--teacher.model", "null"], ["teacher.model is null", "loss.cross_entropy"]),
        (["--loss.logit_kl", "0", "--loss.cross_entropy", "0"], ["nothing to learn from"]),
        (["--loss.reverse_kl", "1"], ["loss.logit_kl and loss.reverse_kl"]),
        (["--student.architecture", "minimoe"], ["bert-pairs"]),
        (["--loss.hidden_cosine", "1", "--teacher.model", "null"], ["loss.hidden_cosine"]),
        (["--loss.hidden_cosine", "1", "--loss.hidden_layers", "[1, 9]"], ["loss.hidden_layers ([1, 9])", "1 to 2"]),
        (["--loss.hidden_cosine", "1", "--loss.hidden_layers", "[1]"], ["the student's 2 layers"]),
        (["--loss.hidden_layers", "[1, 1]"], ["loss.hidden_layers", "loss.hidden_cosine must have a weight"]),
        (["--student.dropout", "0.1"], ["student.dropout (0.1)"]),
        (["--loss.temperature", "0"], ["loss.temperature (0.0)"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_a_mistake_is_one_line_with_key_and_mend(folders, tmp_path, flags, parts):
    with pytest.raises(CapgapError) as caught:
        checked(folders, tmp_path, *(flag.format(folders) for flag in flags))
    message = str(caught.value)
    assert all(part in message for part in parts), message


def test_the_shards_of_the_fixtures_end_documents_with_eos(folders):
    columns = open_shards(folders / "rows").read(np.arange(4))
    assert (columns["input_ids"] == EOS).any() and columns["document_index"].max() > 0


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_recomputed_activations_give_the_same_gradients_to_routers_and_experts(kind, batch):
    config = LossConfig(cross_entropy=1.0, balance=0.0, router_z=0.1)
    found = []
    for recompute in (False, True):
        student = DecoderStudent(build_model(kind), num_ids=len(WORDS)).train()
        if recompute:
            student.backbone.gradient_checkpointing_enable()
        weights = active_losses(config, has_routers=True, is_decoder=True)
        seen = student(batch)
        compute_losses(weights, seen, seen, config).total.backward()
        found.append({name: parameter.grad for name, parameter in student.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
