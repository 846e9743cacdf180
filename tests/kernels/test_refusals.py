"""Every public function refuses what does not fit, in one line that names the argument and both values."""

import inspect

import pytest
import torch

import capgap_kernels
from capgap_kernels import (
    TeacherHead,
    TeacherTopK,
    combine,
    expert_mlp,
    linear_kl,
    permute,
    relation_kl,
    route,
    router_logits,
)

META = torch.device("meta")  # stands for another device than the other arguments'


def right_arguments() -> dict:
    """Arguments that every function accepts: 6 tokens, width 8, 4 experts of width 12, 9 ids."""
    routing = route(torch.randn(6, 4), top_k=2)
    return {
        router_logits: {"hidden_ND": torch.zeros(6, 8), "weight_ED": torch.zeros(4, 8), "bias_E": torch.zeros(4)},
        route: {"router_logits_NE": torch.zeros(6, 4), "top_k": 2},
        permute: {"hidden_ND": torch.zeros(6, 8), "routing": routing},
        combine: {"permuted_MD": torch.zeros(12, 8), "routing": routing},
        expert_mlp: {
            "hidden_ND": torch.zeros(6, 8),
            "routing": routing,
            "w1_EFD": torch.zeros(4, 12, 8),
            "w2_EDF": torch.zeros(4, 8, 12),
        },
        relation_kl: {
            "student": (torch.zeros(2, 6, 8),) * 3,
            "teacher": (torch.zeros(2, 6, 4),) * 3,
            "valid_BT": torch.ones(2, 6, dtype=torch.bool),
            "num_relation_heads": 2,
        },
        linear_kl: {
            "hidden_ND": torch.zeros(6, 8),
            "head_VD": torch.zeros(9, 8),
            "teacher": TeacherHead(torch.zeros(6, 5), torch.zeros(9, 5)),
        },
    }


CHANGES = [
    (router_logits, {"hidden_ND": torch.zeros(6)}, ["hidden_ND", "[tokens, hidden]", "(6,)"]),
    (router_logits, {"hidden_ND": torch.zeros(6, 8).int()}, ["hidden_ND", "floating point", "int32"]),
    (router_logits, {"weight_ED": torch.zeros(4, 7)}, ["weight_ED", "[experts, 8]", "(4, 7)"]),
    (router_logits, {"weight_ED": torch.zeros(4, 8, device=META)}, ["weight_ED", "meta", "cpu"]),
    (router_logits, {"bias_E": torch.zeros(3)}, ["bias_E", "(4,)", "(3,)"]),
    (route, {"router_logits_NE": torch.zeros(6)}, ["router_logits_NE", "[tokens, experts]", "(6,)"]),
    (route, {"router_logits_NE": torch.zeros(6, 4).long()}, ["router_logits_NE", "floating point", "int64"]),
    (route, {"top_k": 0}, ["top_k=0", "1..4"]),
    (route, {"top_k": 5}, ["top_k=5", "1..4", "4 experts"]),
    (route, {"router_logits_NE": torch.zeros(6, 64), "top_k": 9}, ["top_k=9", "1..8", "64 experts"]),
    (route, {"score_function": "tanh"}, ["score_function='tanh'", "'softmax' or 'sigmoid'"]),
    (route, {"selection_bias_E": torch.zeros(3)}, ["selection_bias_E", "(4,)", "(3,)"]),
    (route, {"selection_bias_E": torch.zeros(4, device=META)}, ["selection_bias_E", "meta", "cpu"]),
    (route, {"valid_N": torch.ones(5, dtype=torch.bool)}, ["valid_N", "(6,)", "(5,)"]),
    (route, {"valid_N": torch.ones(6)}, ["valid_N", "torch.bool", "float32"]),
    (route, {"capacity": 0}, ["capacity=0", "at least 1"]),
    (permute, {"hidden_ND": torch.zeros(5, 8)}, ["hidden_ND", "[6, D]", "(5, 8)"]),
    (permute, {"hidden_ND": torch.zeros(6, 8).long()}, ["hidden_ND", "floating point", "int64"]),
    (permute, {"hidden_ND": torch.zeros(6, 8, device=META)}, ["hidden_ND", "meta", "cpu"]),
    (combine, {"permuted_MD": torch.zeros(6, 8)}, ["permuted_MD", "[12, D]", "(6, 8)"]),
    (combine, {"permuted_MD": torch.zeros(12, 8).long()}, ["permuted_MD", "floating point", "int64"]),
    (combine, {"permuted_MD": torch.zeros(12, 8, device=META)}, ["permuted_MD", "meta", "cpu"]),
    (expert_mlp, {"hidden_ND": torch.zeros(5, 8)}, ["hidden_ND", "[6, D]", "(5, 8)"]),
    (expert_mlp, {"hidden_ND": torch.zeros(6, 8).long()}, ["hidden_ND", "floating point", "int64"]),
    (expert_mlp, {"w1_EFD": torch.zeros(3, 12, 8)}, ["w1_EFD", "[4, F, 8]", "(3, 12, 8)"]),
    (expert_mlp, {"w2_EDF": torch.zeros(4, 12, 8)}, ["w2_EDF", "(4, 8, 12)", "(4, 12, 8)"]),
    (expert_mlp, {"w2_EDF": torch.zeros(4, 8, 12).half()}, ["w2_EDF torch.float16", "hidden_ND torch.float32"]),
    (expert_mlp, {"w2_EDF": torch.zeros(4, 8, 12, device=META)}, ["w2_EDF", "meta", "cpu"]),
    (expert_mlp, {"b1_EF": torch.zeros(4, 8)}, ["b1_EF", "(4, 12)", "(4, 8)"]),
    (expert_mlp, {"b2_ED": torch.zeros(4, 12)}, ["b2_ED", "(4, 8)", "(4, 12)"]),
    (expert_mlp, {"w3_EFD": torch.zeros(4, 8, 12)}, ["w3_EFD", "(4, 12, 8)", "(4, 8, 12)"]),
    (expert_mlp, {"activation": "relu"}, ["activation='relu'", "'gelu' or 'silu'"]),
    (relation_kl, {"student": (torch.zeros(2, 5, 8),) * 3}, ["student query", "[2, 5, 8]", "[2, 6]"]),
    (relation_kl, {"student": (torch.zeros(2, 6, 8).int(),) * 3}, ["student query", "int32", "floating-point"]),
    (relation_kl, {"teacher": (torch.zeros(2, 6, 4, device=META),) * 3}, ["teacher query", "meta", "cpu"]),
    (relation_kl, {"num_relation_heads": 3}, ["student query", "width 8", "num_relation_heads=3"]),
    (relation_kl, {"valid_BT": torch.ones(2, 6)}, ["valid_BT", "bool", "float32"]),
    (linear_kl, {"hidden_ND": torch.zeros(6, 7)}, ["hidden_ND", "[6, 7]", "head_VD [9, 8]"]),
    (linear_kl, {"hidden_ND": torch.zeros(6, 8).long()}, ["hidden_ND", "int64", "floating-point"]),
    (linear_kl, {"head_VD": torch.zeros(9, 8).half()}, ["head_VD torch.float16", "hidden_ND", "float32"]),
    (linear_kl, {"head_VD": torch.zeros(9, 8, device=META)}, ["head_VD", "meta", "cpu"]),
    (linear_kl, {"labels_N": torch.zeros(6)}, ["labels_N", "float32", "integer"]),
    (linear_kl, {"labels_N": torch.zeros(5).long()}, ["labels_N", "[5]", "[6]"]),
    (linear_kl, {"valid_N": torch.ones(6)}, ["valid_N", "float32", "torch.bool"]),
    (linear_kl, {"vocab_size": 10}, ["vocab_size=10", "9 ids"]),
    (
        linear_kl,
        {"teacher": TeacherHead(torch.zeros(6, 5), torch.zeros(9, 5, device=META))},
        ["the teacher's head_VD", "meta", "cpu"],
    ),
    (linear_kl, {"teacher": TeacherTopK(torch.zeros(6, 2), torch.zeros(6, 2))}, ["ids_NK", "float32", "integer"]),
]


@pytest.mark.parametrize(
    ("function", "change", "words"), CHANGES, ids=[f"{f.__name__}-{' '.join(words)}" for f, _, words in CHANGES]
)
def test_a_refusal_names_the_argument_and_both_values(function, change, words):
    with pytest.raises(ValueError) as refusal:
        function(**right_arguments()[function] | change)
    assert "\n" not in str(refusal.value)
    for word in words:
        assert word in str(refusal.value)


def test_every_public_function_is_among_them_and_accepts_what_fits():
    tested = right_arguments()
    for function, arguments in tested.items():
        function(**arguments)
    public = {getattr(capgap_kernels, name) for name in capgap_kernels.__all__}
    settings = {capgap_kernels.backend_of, capgap_kernels.use_backend}
    assert {function for function in public if inspect.isfunction(function)} - settings == set(tested)
    assert {function for function, _, _ in CHANGES} == set(tested)
