"""How well a causal language model predicts held-out text, alone or compared with a teacher."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import ConfigError, DataError
from pipeline.eval_tasks.settings import EvalSettings
from pipeline.eval_tasks.task import Headline, Measurement, Unit
from pipeline.eval_tasks.task_files import find_files, read_lines

DEFAULT_LENGTH = 1024


@dataclass(frozen=True)
class Block:
    """A window of the text: ids [T], of which those from `first_scored` on are predicted here and nowhere else."""

    ids: np.ndarray
    first_scored: int


@dataclass(frozen=True)
class HeldOutText:
    """Text cut into windows. `num_bytes` is the UTF-8 length of what is predicted."""

    blocks: list[Block]
    num_bytes: int
    num_tokens: int
    vocabulary: dict[str, int]

    @property
    def sample_ids(self) -> np.ndarray:
        return np.concatenate([block.ids for block in self.blocks[:32]])


@dataclass(frozen=True)
class TextTask:
    """Scores every token of a text file once, each with at least half a window of context before it."""

    headlines: tuple[Headline, ...]
    with_teacher: bool = False
    seeded: bool = False

    def files(self, data: Path) -> list[Path]:
        names = [("text.txt", "test.txt")]
        source = (
            "put plain text that nobody trained on into perplexity/text.txt there (or WikiText-2's wikitext-2/test.txt)"
        )
        return find_files(data, task="perplexity", folders=("perplexity", "wikitext-2"), names=names, source=source)

    def resolved(self, settings: EvalSettings) -> dict[str, Any]:
        resolved: dict[str, Any] = {
            "max_length": settings.max_length or DEFAULT_LENGTH,
            "max_eval_examples": settings.max_eval_examples,
            "precision": settings.precision,
        }
        if self.with_teacher:
            resolved["teacher"] = settings.teacher
        return resolved

    def learning_rates(self, settings: EvalSettings) -> tuple[float | None, ...]:
        return (None,)

    def prepare(self, data: Path, tokenizer: Any, settings: EvalSettings) -> HeldOutText:
        if self.with_teacher and settings.teacher is None:
            raise ConfigError("cannot score agreement: --teacher is missing - it is compared with a teacher - name one")
        (path,) = self.files(data)
        text = "\n".join(line for _, line in read_lines(path))
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.asarray(encoded["input_ids"], dtype=np.int64)
        if len(ids) < 2:
            raise DataError(f"cannot read task data: {path} - it holds no text - put plain UTF-8 text there")
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        blocks = list(windows(ids, length=settings.max_length or DEFAULT_LENGTH, start_id=start))
        blocks = blocks[: settings.max_eval_examples]
        num_scored = sum(len(block.ids) - block.first_scored for block in blocks)
        # Without a start token the first token is context only: its bytes are not predicted.
        first = 0 if start is not None else 1
        begin, end = encoded["offset_mapping"][first][0], encoded["offset_mapping"][first + num_scored - 1][1]
        return HeldOutText(
            blocks=blocks,
            num_bytes=len(text[begin:end].encode("utf-8")),
            num_tokens=num_scored,
            vocabulary=tokenizer.get_vocab(),
        )

    def work(self, prepared: HeldOutText, settings: EvalSettings) -> int:
        return len(prepared.blocks)

    def measure(
        self,
        prepared: HeldOutText,
        *,
        source: Any,
        settings: EvalSettings,
        unit: Unit,
        device: Any,
        on_step: Callable[[int], None],
    ) -> Measurement:
        import torch
        from transformers import AutoModelForCausalLM

        from pipeline.eval_tasks.loading import ModelSource

        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        model = source.model(AutoModelForCausalLM, device=device, dtype=dtype, head_is_new=False).eval()
        teacher = None
        if self.with_teacher:
            assert settings.teacher is not None
            teacher_source = ModelSource.find(settings.teacher, trust_remote_code=source.trust_remote_code)
            refuse_other_vocabulary(prepared.vocabulary, teacher_source.tokenizer().get_vocab(), settings.teacher)
            teacher = teacher_source.model(AutoModelForCausalLM, device=device, dtype=dtype, head_is_new=False).eval()
        vocabulary_size = max(prepared.vocabulary.values()) + 1
        nll = divergence = agreed = 0.0
        with torch.inference_mode():
            for block in prepared.blocks:
                ids_1T = torch.from_numpy(block.ids)[None].to(device)
                targets_S = ids_1T[0, block.first_scored :]
                # Rows of a padded vocabulary that no token owns are cut: what remains is over real tokens.
                logits_SV = model(ids_1T).logits[0, block.first_scored - 1 : -1, :vocabulary_size].float()
                log_q = logits_SV.log_softmax(-1)
                nll -= log_q.gather(-1, targets_S[:, None]).double().sum().item()
                if teacher is not None:
                    teacher_SV = teacher(ids_1T).logits[0, block.first_scored - 1 : -1, :vocabulary_size].float()
                    log_p = teacher_SV.log_softmax(-1)
                    divergence += (log_p.exp() * (log_p - log_q)).double().sum().item()
                    agreed += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
                on_step(1)
        count = prepared.num_tokens
        metrics = {"bits_per_byte": nll / math.log(2) / prepared.num_bytes, "perplexity": math.exp(nll / count)}
        if teacher is not None:
            metrics |= {"teacher_kl": divergence / count, "teacher_top1": agreed / count}
        counts = {"tokens": count, "bytes": prepared.num_bytes}
        return Measurement(metrics=metrics, selection=-metrics["bits_per_byte"], counts=counts)


def windows(ids: np.ndarray, *, length: int, start_id: int | None) -> Iterator[Block]:
    """Windows of at most `length` tokens that move on by half of it; each token is scored in exactly one.

    With a start token every window begins with it and the first token is scored too.
    """
    prefix = np.asarray([] if start_id is None else [start_id], dtype=np.int64)
    room = length - len(prefix)
    stride = max(1, room // 2)
    scored = 0 if start_id is not None else 1
    begin = 0
    while scored < len(ids):
        end = min(begin + room, len(ids))
        yield Block(ids=np.concatenate([prefix, ids[begin:end]]), first_scored=len(prefix) + scored - begin)
        scored = end
        begin = end - room + stride


def refuse_other_vocabulary(student: dict[str, int], teacher: dict[str, int], name: str) -> None:
    """Raises ConfigError with examples when a token has another id in the teacher's vocabulary, or none."""
    different = [token for token, number in student.items() if teacher.get(token) != number]
    different += [token for token in teacher if token not in student]
    if different:
        raise ConfigError(
            f"cannot compare with teacher {name} - {len(different)} tokens differ, such as "
            f"{', '.join(map(repr, different[:5]))} - agreement needs one vocabulary: score a student of this teacher"
        )


PERPLEXITY = TextTask(
    (
        Headline("bits per byte", "bits_per_byte", percent=False, higher_is_better=False),
        Headline("perplexity", "perplexity", percent=False, higher_is_better=False),
    )
)
AGREEMENT = TextTask(
    (
        Headline("KL from teacher", "teacher_kl", percent=False, higher_is_better=False),
        Headline("top-1 as teacher", "teacher_top1"),
    ),
    with_teacher=True,
)
