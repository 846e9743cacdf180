"""Students and teachers: the figures that must come out, and every shortcut against the plain thing."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from data_prep.errors import ConfigError
from pipeline.config import StudentConfig, TeacherConfig
from pipeline.models.initialization import copy_bert_layers, split_experts, spread_layers
from pipeline.models.modeling_minimoe import MiniMoEAttention, MiniMoEFeedForward, MiniMoEModel, choose_expert
from pipeline.models.sizes import linear_macs, num_parameters
from pipeline.models.students import DenseStudent, MiniMoEStudent, RoutedAttention, RoutedFeedForward, build_student
from pipeline.models.teachers import load_teacher
from pipeline.signals import Batch
from pipeline.watching import router_health
from tiny_runs import write_teacher

# B rows, T tokens of a row, D hidden width, N = B*T tokens, E experts, F width of an expert

BERT = {"vocab_size": 30522, "max_position_embeddings": 512}
TINY = {"vocab_size": 60, "max_position_embeddings": 24}
SMALL = StudentConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=4, intermediate_size=24, num_experts=3)


def small_student(seed: int = 0, **changes) -> Any:
    """A MiniMoE whose routers spread the tokens; freshly drawn ones of this size hardly differ between tokens."""
    student = build_student(replace(SMALL, **changes), teacher_config=TINY, init_folder=None, seed=seed)
    assert isinstance(student, MiniMoEStudent)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            spread = 0.05 if "bias" in name else 1.0 if "gate" in name or "embeddings" in name else 0.2
            if "norm" not in name:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return student


def rows(lengths: tuple[int, ...] = (12, 7, 2, 9), *, width: int = 12, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, 60, (len(lengths), width), generator=generator)
    valid_BT = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    segments = (torch.arange(width) >= torch.tensor(lengths).unsqueeze(1) // 2) & valid_BT
    return Batch(input_ids * valid_BT, valid_BT, segments.long())


def without_padding(batch: Batch, row: int) -> Batch:
    """One row alone, cut after its last valid token."""
    assert batch.token_type_ids is not None
    length = int(batch.valid_BT[row].sum())
    cut = (slice(row, row + 1), slice(length))
    return Batch(batch.input_ids[cut], batch.valid_BT[cut], batch.token_type_ids[cut])


# Sizes


def test_the_dense_student_of_the_paper_has_17241984_parameters():
    dense = build_student(StudentConfig(architecture="dense"), teacher_config=BERT, init_folder=None, seed=0)
    assert num_parameters(dense.served_model()) == 17_241_984
    assert type(dense.served_model()) is BertModel
    assert linear_macs(dense.served_model(), 128) / 1e9 == pytest.approx(0.679, abs=5e-4)


def test_minimoe_of_the_paper_has_28324236_parameters_in_training_and_27880716_as_served():
    student = build_student(StudentConfig(), teacher_config=BERT, init_folder=None, seed=0)
    served = student.served_model()
    assert num_parameters(student) == 28_324_236
    assert num_parameters(served) == 27_880_716
    assert type(served) is MiniMoEModel
    # One expert works per token: the multiply-accumulates are the dense student's and those of three small gates.
    assert linear_macs(served, 128) == 128 * 3 * (12 * 384 * 384 + 4 * 384)


@pytest.mark.parametrize(
    ("layers", "hidden", "giga_macs"),
    [(12, 768, 10.87), (6, 384, 1.359), (4, 384, 0.906), (3, 384, 0.679), (4, 192, 0.226)],
)
def test_multiply_accumulates_are_those_that_the_papers_print(layers, hidden, giga_macs):
    config = BertConfig(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden)
    with torch.device("meta"):
        model = BertModel(config, add_pooling_layer=False)
    assert linear_macs(model, 128) / 1e9 == pytest.approx(giga_macs, abs=0.005 if giga_macs > 2 else 5e-4)


def test_attention_experts_add_parameters_but_no_work():
    one, three = small_student(), small_student(num_attention_experts=3)
    attention = 4 * (16 * 16 + 16)
    gates = 2 * (3 * 16 + 3)
    assert num_parameters(three) - num_parameters(one) == 2 * 2 * attention + gates
    assert linear_macs(three.served_model(), 10) - linear_macs(one.served_model(), 10) == 10 * 2 * 3 * 16


# Routing


@pytest.mark.parametrize("layer_class", [MiniMoEFeedForward, RoutedFeedForward])
def test_identical_experts_with_top_1_give_the_dense_output_scaled_by_the_gate(layer_class):
    torch.manual_seed(0)
    config = small_student().backbone.config
    layer = layer_class(config).double()
    w1_FD, w2_DF = torch.randn(24, 16).double(), torch.randn(16, 24).double()
    b1_F, b2_D = torch.randn(24).double(), torch.randn(16).double()
    with torch.no_grad():
        layer.experts.w1.copy_(w1_FD.expand(3, -1, -1))
        layer.experts.w2.copy_(w2_DF.expand(3, -1, -1))
        layer.experts.w3.copy_(torch.cat([b1_F, b2_D]).expand(3, 1, -1))
    hidden_BTD = torch.randn(2, 5, 16).double()
    dense_BTD = F.linear(F.gelu(F.linear(hidden_BTD, w1_FD, b1_F)), w2_DF, b2_D)
    gate_BT1 = layer.gate(hidden_BTD).softmax(-1).max(-1, keepdim=True).values
    output_BTD, _ = layer(hidden_BTD, torch.ones(2, 5, dtype=torch.bool))
    torch.testing.assert_close(output_BTD, gate_BT1 * dense_BTD)


def test_identical_experts_behind_a_gate_of_one_make_the_dense_encoder_that_they_came_from(tmp_path):
    folder = write_teacher(tmp_path / "source", layers=2)
    config = replace(SMALL, hidden_size=32, intermediate_size=64, expert_init="identical")
    source = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    teacher_config = {"vocab_size": 200, "max_position_embeddings": 64}
    for attention_experts in (1, 2):
        student = build_student(
            replace(config, num_attention_experts=attention_experts),
            teacher_config=teacher_config,
            init_folder=folder,
            seed=0,
        ).eval()
        assert isinstance(student, MiniMoEStudent)
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if name.endswith("gate.bias"):
                    parameter[1] = 1e4
        batch = rows()
        expected = source(batch.input_ids, batch.valid_BT, batch.token_type_ids).last_hidden_state
        hidden = student(batch).hidden_states_BTD
        torch.testing.assert_close(hidden[batch.valid_BT], expected[batch.valid_BT], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer_class", [MiniMoEAttention, RoutedAttention])
def test_each_token_uses_the_four_maps_of_its_own_attention_expert(layer_class):
    torch.manual_seed(1)
    config = small_student(num_attention_experts=3).backbone.config
    layer = layer_class(config).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    hidden_TD, length, heads = torch.randn(6, 16).double(), 5, 4
    expert_T, gate_T, _ = choose_expert(layer.gate, hidden_TD)
    assert len(set(expert_T.tolist())) > 1
    mapped = [layer.qkv_weight[e] @ hidden + layer.qkv_bias[e] for e, hidden in zip(expert_T, hidden_TD, strict=True)]
    query, key, value = torch.stack(mapped).chunk(3, dim=-1)
    expected = []
    for token in range(length):
        context = []
        for head in range(heads):
            part = slice(4 * head, 4 * head + 4)
            weights = (key[:length, part] @ query[token, part] / 2).softmax(0)
            context.append(weights @ value[:length, part])
        expert = expert_T[token]
        mapped_back = layer.output_weight[expert] @ torch.cat(context) + layer.output_bias[expert]
        expected.append(gate_T[token] * mapped_back)
    output, _ = layer(hidden_TD.unsqueeze(0), (torch.arange(6) < length).unsqueeze(0))
    torch.testing.assert_close(output[0, :length], torch.stack(expected))


@pytest.mark.parametrize("attention_experts", [1, 2])
def test_a_batch_with_padding_equals_the_same_rows_without(attention_experts):
    """Hidden states, router sums and every gradient; padded tokens are neither routed nor counted."""
    padded = small_student(num_attention_experts=attention_experts).double()
    alone = copy.deepcopy(padded)
    batch = rows()
    seen = padded(batch)
    single = [alone(without_padding(batch, row)) for row in range(4)]
    hidden = [signals.hidden_states_BTD[0] for signals in single]
    torch.testing.assert_close(seen.hidden_states_BTD[batch.valid_BT], torch.cat(hidden))
    assert set(seen.routers) == {
        f"layers.{i}.{part}" for i in (0, 1) for part in ("attention", "moe")[2 - attention_experts :]
    }
    for name, router in seen.routers.items():
        assert router.tokens_per_expert_E.sum() == batch.valid_BT.sum() == 30
        assert (router.tokens_per_expert_E > 0).sum() > 1, "the test needs tokens at several experts"
        for part in ("tokens_per_expert_E", "gate_sum_E", "z_loss_sum", "entropy_sum"):
            total = torch.stack([getattr(signals.routers[name], part) for signals in single]).sum(0)
            torch.testing.assert_close(getattr(router, part), total)

    def training_signal(signals) -> Any:
        valid = signals.valid_BT.unsqueeze(-1)
        relations = sum((part.pow(2) * valid).sum() for part in signals.relations)
        return relations + sum(router.z_loss_sum + router.gate_sum_E[0] for router in signals.routers.values())

    training_signal(seen).backward()
    torch.stack([training_signal(signals) for signals in single]).sum().backward()
    assert_gradients_equal(padded, alone)


def assert_gradients_equal(one: nn.Module, other: nn.Module, **tolerance) -> None:
    expected = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        if expected[name].grad is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name, **tolerance)


def test_the_dense_students_relations_do_not_see_padding_either():
    config = replace(SMALL, architecture="dense")
    student = build_student(config, teacher_config=TINY, init_folder=None, seed=0).eval()
    batch = rows()
    for ours, *alone in zip(
        student(batch).relations, *(student(without_padding(batch, row)).relations for row in range(4)), strict=True
    ):
        torch.testing.assert_close(ours[batch.valid_BT], torch.cat([part[0] for part in alone]), atol=1e-6, rtol=0)


def test_what_stands_on_padding_cannot_be_seen():
    student = small_student().eval()
    batch = rows()
    other = replace(batch, input_ids=torch.where(batch.valid_BT, batch.input_ids, 41))
    ours, theirs = student(batch), student(other)
    torch.testing.assert_close(
        ours.hidden_states_BTD[batch.valid_BT], theirs.hidden_states_BTD[batch.valid_BT], atol=0, rtol=0
    )
    for name, router in ours.routers.items():
        assert router.gate_sum_E.equal(theirs.routers[name].gate_sum_E)


def test_router_jitter_moves_the_gates_in_training_only():
    student = small_student(router_jitter=0.5)
    batch = rows()
    torch.manual_seed(0)
    first, second = student(batch), student(batch)
    assert not torch.equal(first.hidden_states_BTD, second.hidden_states_BTD)
    student.eval()
    assert torch.equal(student(batch).hidden_states_BTD, student(batch).hidden_states_BTD)


# Student against served model, checkpointing, precision


@pytest.mark.parametrize("attention_experts", [1, 2])
def test_the_served_model_computes_what_the_student_computed(attention_experts):
    student = small_student(num_attention_experts=attention_experts).eval()
    served = student.served_model().eval()
    served.load_state_dict(student.backbone.state_dict())
    batch = rows()
    plain = served(batch.input_ids, batch.valid_BT.long(), batch.token_type_ids)
    valid = batch.valid_BT
    hidden = student(batch).hidden_states_BTD
    torch.testing.assert_close(plain.last_hidden_state[valid], hidden[valid], atol=1e-5, rtol=0)
    assert len(plain.router_logits) == 2 * attention_experts
    assert not any("relation" in name for name, _ in served.named_parameters())


@pytest.mark.parametrize("attention_experts", [1, 2])
def test_activation_checkpointing_changes_no_gradient(attention_experts):
    plain = small_student(num_attention_experts=attention_experts, dropout=0.1, router_jitter=0.1).train()
    saving = copy.deepcopy(plain)
    saving.backbone.gradient_checkpointing_enable()
    for student in (plain, saving):
        torch.manual_seed(3)
        signals = student(rows())
        routers = sum(router.z_loss_sum + router.gate_sum_E[0] for router in signals.routers.values())
        (sum(part.pow(2).sum() for part in signals.relations) + routers).backward()
    assert all(p.grad is not None for name, p in plain.named_parameters() if "position" not in name)
    assert_gradients_equal(saving, plain, atol=0, rtol=0)


def test_activation_checkpointing_keeps_the_dense_students_gradients():
    plain = build_student(replace(SMALL, architecture="dense"), teacher_config=TINY, init_folder=None, seed=0).train()
    saving = copy.deepcopy(plain)
    saving.backbone.gradient_checkpointing_enable()
    for student in (plain, saving):
        sum(part.pow(2).sum() for part in student(rows()).relations).backward()
    assert_gradients_equal(saving, plain, atol=0, rtol=0)


# Selection bias


def set_biases(student: Any, *values: float) -> None:
    for name, buffer in student.named_buffers():
        if name.endswith("selection_bias"):
            buffer.copy_(torch.tensor(values))


@pytest.mark.parametrize("attention_experts", [1, 3])
def test_the_served_model_chooses_by_the_selection_bias_too(attention_experts):
    student = small_student(num_attention_experts=attention_experts, selection_bias_rate=0.01).eval()
    free = student(rows()).hidden_states_BTD
    set_biases(student, 0.0, 0.4, -0.2)
    batch = rows()
    signals = student(batch)
    assert not signals.hidden_states_BTD.allclose(free)
    served = student.served_model().eval()
    served.load_state_dict(student.backbone.state_dict())
    theirs = served(batch.input_ids, batch.valid_BT, batch.token_type_ids).last_hidden_state
    torch.testing.assert_close(theirs[batch.valid_BT], signals.hidden_states_BTD[batch.valid_BT], atol=1e-5, rtol=0)


def test_a_selection_bias_steers_the_choice_and_not_the_gate():
    student = small_student(selection_bias_rate=0.01)
    set_biases(student, 0.0, 2.0, 0.0)
    routers = student(rows()).routers
    assert all(router.tokens_per_expert_E.tolist() == [0, 30, 0] for router in routers.values())
    layer = student.backbone.layers[0].moe
    hidden_ND = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    _, gate_N, logits_NE = choose_expert(layer.gate, hidden_ND, layer.selection_bias)
    assert gate_N.equal(logits_NE.softmax(-1)[:, 1])


def test_a_selection_bias_moves_by_its_rate_towards_an_even_load():
    student = small_student(selection_bias_rate=0.25)
    loads = {name: torch.tensor([10, 4, 7]) for name in student.router_names}
    student.move_selection_biases(loads, 0.25)
    student.move_selection_biases(loads, 0.25)
    for name, buffer in student.named_buffers():
        if name.endswith("selection_bias"):
            assert buffer.tolist() == [-0.5, 0.5, 0.0] and buffer.dtype == torch.float32


def test_selection_biases_even_out_a_skewed_router_within_a_few_dozen_steps():
    """Nothing else is trained here. The padding of the rows goes to no expert and moves nothing."""
    student = small_student(selection_bias_rate=0.02)
    with torch.no_grad():
        for layer in student.backbone.layers:
            layer.moe.gate.bias.copy_(torch.tensor([4.0, 0.0, 0.0]))
    violations = []
    for step in range(60):
        batch = rows((24,) * 16 + (7,) * 16, width=24, seed=step)
        loads = {name: router.tokens_per_expert_E for name, router in student(batch).routers.items()}
        assert all(int(load_E.sum()) == 16 * 24 + 16 * 7 for load_E in loads.values())
        student.move_selection_biases(loads, 0.02)
        violations.append(max(router_health((load / load.sum()).tolist())["max_violation"] for load in loads.values()))
    assert violations[0] > 1
    assert sum(violations[-10:]) / 10 < 0.25 * violations[0], violations


def test_a_selection_bias_where_an_export_could_not_carry_it_is_refused_with_the_mend():
    for architecture in ("dense", "decoder"):
        with pytest.raises(ConfigError, match=r"student.selection_bias_rate \(0.001\).*use loss.balance") as caught:
            StudentConfig(architecture=architecture, selection_bias_rate=0.001)
        assert "\n" not in str(caught.value)


def test_fp32_follows_float64():
    single = small_student(num_attention_experts=2)
    double = copy.deepcopy(single).double()
    batch = rows()
    ours, exact = single(batch), double(batch)
    assert exact.hidden_states_BTD.dtype == torch.float64
    torch.testing.assert_close(ours.hidden_states_BTD.double(), exact.hidden_states_BTD, atol=2e-5, rtol=0)
    for signals in (ours, exact):
        (signals.relations[0] * batch.valid_BT.unsqueeze(-1)).pow(2).mean().backward()
    for name, parameter in single.named_parameters():
        expected = double.get_parameter(name).grad
        if expected is not None:
            difference = (parameter.grad.double() - expected).norm() / (expected.norm() + 1e-6)
            assert difference < 1e-4, name


def test_in_bf16_the_router_still_decides_in_float32():
    student = small_student().bfloat16()
    hidden_ND = torch.randn(40, 16).bfloat16()
    gate = student.backbone.layers[0].moe.gate
    _, gate_N, logits_NE = choose_expert(gate, hidden_ND)
    assert (logits_NE.dtype, gate_N.dtype) == (torch.float32, torch.bfloat16)
    expected = hidden_ND.float() @ gate.weight.float().T + gate.bias.float()
    torch.testing.assert_close(logits_NE, expected)
    assert student(rows()).hidden_states_BTD.isfinite().all()


# First weights


def dense_ffn(width: int, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w1_SD": (width, 6), "b1_S": (width,), "w2_DS": (6, width), "b2_D": (6,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def split(ffn: dict[str, Tensor], how: str, *, experts: int = 4, width: int = 12, shared: float = 2 / 3):
    return split_experts(
        **ffn,
        num_experts=experts,
        width=width,
        how=how,
        shared_fraction=shared,
        generator=torch.Generator().manual_seed(1),
    )


def neuron_sources(ffn: dict[str, Tensor], split_weights: tuple[Tensor, ...]) -> list[list[int | None]]:
    """For each expert and neuron, the neuron of the dense layer with the same ingoing and outgoing weights and bias."""
    w1_EFD, b1_EF, w2_EDF, b2_ED = split_weights
    assert all(b2_D.equal(ffn["b2_D"]) for b2_D in b2_ED)
    found: list[list[int | None]] = []
    for w1_FD, b1_F, w2_DF in zip(w1_EFD, b1_EF, w2_EDF, strict=True):
        found.append([])
        for neuron in range(len(w1_FD)):
            same = [
                source
                for source in range(len(ffn["b1_S"]))
                if w1_FD[neuron].equal(ffn["w1_SD"][source])
                and w2_DF[:, neuron].equal(ffn["w2_DS"][:, source])
                and b1_F[neuron] == ffn["b1_S"][source]
            ]
            found[-1].append(same[0] if same else None)
    return found


def test_an_identical_split_repeats_the_layer_and_needs_its_width():
    ffn = dense_ffn(12)
    assert neuron_sources(ffn, split(ffn, "identical")) == [list(range(12))] * 4
    with pytest.raises(ConfigError, match=r"intermediate_size \(12\) equal to the source's \(16\)"):
        split(dense_ffn(16), "identical")


def test_a_shared_split_keeps_two_thirds_and_draws_the_rest_for_each_expert():
    ffn = dense_ffn(12)
    weights = split(ffn, "shared")
    assert neuron_sources(ffn, weights) == [[*range(8), *[None] * 4]] * 4
    own = weights[0][:, 8:]
    assert len({tuple(expert.flatten().tolist()) for expert in own}) == 4
    assert (weights[1][:, 8:] == 0).all()
    assert torch.equal(weights[0], split(ffn, "shared")[0]), "the seed decides"


def test_a_wider_source_deals_its_other_neurons_out_to_the_experts():
    ffn = dense_ffn(8 + 16)
    sources = neuron_sources(ffn, split(ffn, "shared"))
    assert [expert[:8] for expert in sources] == [list(range(8))] * 4
    dealt = [neuron for expert in sources for neuron in expert[8:]]
    assert sorted(neuron for neuron in dealt if neuron is not None) == list(range(8, 24)), "none lost, none twice"


def test_a_source_that_is_a_little_wider_is_used_up_before_anything_is_drawn():
    ffn = dense_ffn(8 + 6)
    sources = neuron_sources(ffn, split(ffn, "shared"))
    dealt = [neuron for expert in sources for neuron in expert[8:]]
    assert sorted(neuron for neuron in dealt if neuron is not None) == list(range(8, 14))
    assert dealt.count(None) == 16 - 6


def test_an_importance_split_shares_the_neurons_with_the_largest_weights():
    ffn = dense_ffn(24)
    strength = ffn["w1_SD"].norm(dim=1) * ffn["w2_DS"].norm(dim=0)
    strongest = strength.argsort(descending=True).tolist()
    sources = neuron_sources(ffn, split(ffn, "importance"))
    assert [expert[:8] for expert in sources] == [strongest[:8]] * 4
    dealt = [neuron for expert in sources for neuron in expert[8:]]
    assert sorted(neuron for neuron in dealt if neuron is not None) == sorted(strongest[8:])


@pytest.mark.parametrize(("shared", "width"), [(0.0, 12), (1.0, 12), (0.5, 6), (1.0, 30)])
def test_any_share_and_any_width_give_experts_of_the_right_shape(shared, width):
    for how in ("shared", "importance"):
        w1_EFD, b1_EF, w2_EDF, b2_ED = split(dense_ffn(12), how, shared=shared, width=width)
        assert (w1_EFD.shape, b1_EF.shape) == ((4, width, 6), (4, width))
        assert (w2_EDF.shape, b2_ED.shape) == ((4, 6, width), (4, 6))
        assert all(part.isfinite().all() for part in (w1_EFD, b1_EF, w2_EDF))


def test_layers_are_spread_evenly_and_end_at_the_last():
    assert spread_layers(12, 3) == (3, 7, 11)
    assert spread_layers(6, 3) == (1, 3, 5)
    assert spread_layers(5, 5) == (0, 1, 2, 3, 4)
    assert spread_layers(24, 4) == (5, 11, 17, 23)


def test_a_student_starts_from_the_chosen_layers_of_its_source(tmp_path):
    folder = write_teacher(tmp_path / "source", layers=4)
    source = BertModel.from_pretrained(folder, add_pooling_layer=False)
    config = replace(SMALL, architecture="dense", hidden_size=32, intermediate_size=64, init_layers=(2, 0))
    student = build_student(config, teacher_config=source.config.to_dict(), init_folder=folder, seed=0)
    assert isinstance(student, DenseStudent)
    for index, layer in enumerate((2, 0)):
        ours, theirs = student.backbone.encoder.layer[index].state_dict(), source.encoder.layer[layer].state_dict()
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert student.backbone.embeddings.word_embeddings.weight.equal(source.embeddings.word_embeddings.weight)


def test_a_source_of_another_width_or_kind_is_refused(tmp_path):
    folder = write_teacher(tmp_path / "source", layers=2)
    config = replace(SMALL, architecture="dense", intermediate_size=64)
    with pytest.raises(ConfigError, match=r"has shape \[200, 32\], the student needs \[200, 16\]|has shape"):
        build_student(config, teacher_config=TINY, init_folder=folder, seed=0)
    student = BertModel(BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(ConfigError, match="only BERT-family models can be copied"):
        copy_bert_layers(student, nn.Linear(2, 2), (0,))


def test_a_roberta_gives_its_layers_although_its_positions_and_segments_differ():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 30,
    }
    source = RobertaModel(
        RobertaConfig(**sizes, max_position_embeddings=26, type_vocab_size=1), add_pooling_layer=False
    )
    student = BertModel(BertConfig(**sizes, max_position_embeddings=24), add_pooling_layer=False)
    segment_b = student.embeddings.token_type_embeddings.weight[1].clone()
    copy_bert_layers(student, source, (0, 1))
    ours, theirs = student.encoder.state_dict(), source.encoder.state_dict()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert student.embeddings.token_type_embeddings.weight[1].equal(segment_b)


def test_the_seed_decides_the_first_weights_and_the_callers_random_state_stays():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_student(SMALL, teacher_config=TINY, init_folder=None, seed=1).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    again = build_student(SMALL, teacher_config=TINY, init_folder=None, seed=1).state_dict()
    other = build_student(SMALL, teacher_config=TINY, init_folder=None, seed=2).state_dict()
    assert all(first[name].equal(again[name]) for name in first)
    assert not first["backbone.layers.0.moe.gate.weight"].equal(other["backbone.layers.0.moe.gate.weight"])


# Teachers


@pytest.mark.parametrize("relation_layer", [-1, -2, 0, 2])
def test_teacher_relations_are_those_that_the_whole_model_computes(teacher_folder, relation_layer):
    """The teacher is cut after its layer; here the whole BertModel runs, with hooks on that layer's three maps."""
    whole = BertModel.from_pretrained(teacher_folder, add_pooling_layer=False).eval()
    attention = whole.encoder.layer[relation_layer].attention.self
    caught: dict[str, Tensor] = {}
    for part in ("query", "key", "value"):
        getattr(attention, part).register_forward_hook(lambda _, __, output, part=part: caught.update({part: output}))
    batch = rows((12, 5, 12))
    with torch.no_grad():
        whole(batch.input_ids, attention_mask=batch.valid_BT.long(), token_type_ids=batch.token_type_ids)
    config = TeacherConfig(model=str(teacher_folder), relation_layer=relation_layer)
    teacher: Any = load_teacher(teacher_folder, config, dtype=torch.float32)
    relations = teacher(batch).relations
    assert relations is not None and len(relations) == 3
    for name, ours in zip(("query", "key", "value"), relations, strict=True):
        torch.testing.assert_close(ours[batch.valid_BT], caught[name][batch.valid_BT], atol=1e-6, rtol=0)
    assert len(teacher.encoder.encoder.layer) == (relation_layer + 1 if relation_layer >= 0 else 4 + relation_layer)


def test_a_teacher_is_frozen_and_its_dropout_is_off(teacher_folder):
    teacher = load_teacher(teacher_folder, TeacherConfig(model=str(teacher_folder)), dtype=torch.float32)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    first, second = teacher(rows()).relations, teacher(rows()).relations
    assert all(one.equal(two) for one, two in zip(first, second, strict=True))


@pytest.mark.slow  # the compiler takes its time
def test_a_compiled_teacher_says_the_same_in_one_graph_whatever_the_padding(teacher_folder):
    from torch._dynamo.utils import counters

    plain = load_teacher(teacher_folder, TeacherConfig(model=str(teacher_folder)), dtype=torch.float32)
    compiled = load_teacher(teacher_folder, TeacherConfig(model=str(teacher_folder)), dtype=torch.float32)
    compiled.compile()
    counters.clear()
    for seed, lengths in enumerate([(12, 7, 2, 9), (12, 12, 12, 12), (3, 3, 2, 1)]):
        expected, found = plain(rows(lengths, seed=seed)), compiled(rows(lengths, seed=seed))
        for ours, theirs in zip(found.relations, expected.relations, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("relation_layer", [3, -4])
def test_a_relation_layer_that_does_not_exist_is_refused_with_the_range(teacher_folder, relation_layer):
    config = TeacherConfig(model=str(teacher_folder), relation_layer=relation_layer)
    with pytest.raises(ConfigError, match=rf"relation_layer \({relation_layer}\).*has 3 layers - choose -3 to 2"):
        load_teacher(teacher_folder, config, dtype=torch.float32)


def test_the_dense_student_trains_all_that_its_relations_depend_on_and_nothing_else():
    student = build_student(replace(SMALL, architecture="dense"), teacher_config=TINY, init_folder=None, seed=0)
    sum(part.pow(2).sum() for part in student(rows()).relations).backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        is_above = name.startswith("backbone.encoder.layer.1.") and ".attention.self." not in name
        assert parameter.requires_grad != is_above, name
