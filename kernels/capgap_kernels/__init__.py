"""Kernels of the capgap students: mixture-of-experts routing and expert feed-forwards, and distillation losses.

Each public function has its definition under the same name in `reference`; CUDA tensors run Triton, CPU tensors a fast
eager path (`dispatch.use_backend` forces one of them).
"""

from capgap_kernels.dispatch import backend_of, use_backend
from capgap_kernels.expert_mlp import expert_mlp
from capgap_kernels.linear_kl import linear_kl
from capgap_kernels.permutation import combine, permute
from capgap_kernels.reference import Routing
from capgap_kernels.relation_kl import relation_kl
from capgap_kernels.router import router_logits
from capgap_kernels.routing import route
from capgap_kernels.teacher_signals import DistillationSums, TeacherHead, TeacherLogits, TeacherSamples, TeacherTopK

__all__ = [
    "DistillationSums",
    "Routing",
    "TeacherHead",
    "TeacherLogits",
    "TeacherSamples",
    "TeacherTopK",
    "backend_of",
    "combine",
    "expert_mlp",
    "linear_kl",
    "permute",
    "relation_kl",
    "route",
    "router_logits",
    "use_backend",
]
