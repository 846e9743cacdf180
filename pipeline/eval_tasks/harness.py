"""Multiple-choice and cloze benchmarks for causal language models, run by lm-eval on local files."""

import csv
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import ConfigError, DataError
from pipeline.eval_tasks.settings import EvalSettings
from pipeline.eval_tasks.task import Headline, Measurement, Unit
from pipeline.eval_tasks.task_files import COLLECTIONS, fixed_part, read_lines, refuse_line

Document = dict[str, Any]
MEND_LINE = "put the set's own file there"


@dataclass(frozen=True)
class Benchmark:
    """Documents of all subsets, the examples before a question, and the text by which throughput is measured."""

    subsets: dict[str, list[Document]]
    examples: dict[str, list[Document]]
    sample_ids: np.ndarray


@dataclass(frozen=True)
class HarnessTask:
    """A benchmark with lm-eval's prompt and metric, fed from a local file or a folder with a file per subset."""

    pattern: str
    """Files under --data, as a glob."""
    source: str
    read: Callable[[Path], list[Document]]
    prompt: dict[str, Any]
    """The part of lm-eval's task configuration that says how a document becomes requests."""
    headlines: tuple[Headline, ...]
    metrics: tuple[str, ...] = ("acc",)
    num_examples: int = 0
    """Solved examples before each question, from the subset's file in `examples_folder`."""
    examples_folder: str = ""
    seeded: bool = False

    def files(self, data: Path) -> list[Path]:
        questions = self.question_files(data)
        examples = [self.example_file(path) for path in questions] if self.num_examples else []
        if missing := next((path for path in examples if not path.is_file()), None):
            raise DataError(f"cannot score: {missing} - file is missing - {self.source}")
        return [*questions, *examples]

    def example_file(self, questions: Path) -> Path:
        return questions.parents[1] / self.examples_folder / questions.name.replace("_test", "_dev")

    def question_files(self, data: Path) -> list[Path]:
        for collection in COLLECTIONS:
            if found := sorted((data / collection).glob(self.pattern)):
                return found
        raise DataError(f"cannot score: {data / self.pattern} - no such file - {self.source}")

    def resolved(self, settings: EvalSettings) -> dict[str, Any]:
        return {
            "num_examples": self.num_examples,
            "max_length": settings.max_length,
            "max_eval_examples": settings.max_eval_examples,
            "precision": settings.precision,
        }

    def learning_rates(self, settings: EvalSettings) -> tuple[float | None, ...]:
        return (None,)

    def prepare(self, data: Path, tokenizer: Any, settings: EvalSettings) -> Benchmark:
        require_lm_eval()
        files = self.question_files(data)
        documents = {path.stem: self.read(path) for path in files}
        limit = settings.max_eval_examples
        subsets = {name: [docs[i] for i in fixed_part(len(docs), limit)] for name, docs in documents.items()}
        examples = {}
        if self.num_examples:
            examples = {path.stem: self.read(self.example_file(path))[: self.num_examples] for path in files}
        text = " ".join(str(value) for docs in subsets.values() for value in docs[0].values())
        ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
        return Benchmark(subsets=subsets, examples=examples, sample_ids=ids)

    def work(self, prepared: Benchmark, settings: EvalSettings) -> int:
        return sum(map(len, prepared.subsets.values()))

    def measure(
        self,
        prepared: Benchmark,
        *,
        source: Any,
        settings: EvalSettings,
        unit: Unit,
        device: Any,
        on_step: Callable[[int], None],
    ) -> Measurement:
        import torch
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        model = source.model(AutoModelForCausalLM, device=device, dtype=dtype, head_is_new=False).eval()
        language_model = HFLM(
            pretrained=model,
            tokenizer=source.tokenizer(),
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            backend="causal",
        )
        # Without its own tasks: reading their thousands of files would take longer than a small benchmark.
        manager = TaskManager(include_defaults=False)
        # All subsets in one call: each call describes the machine anew, for seconds, and MMLU has 57 of them.
        results = simple_evaluate(
            model=language_model,
            tasks=[
                self.configuration(f"{unit.task}_{name}", documents, prepared.examples.get(name, []))
                for name, documents in prepared.subsets.items()
            ],
            log_samples=False,
            bootstrap_iters=0,
            task_manager=manager,
            verbosity="ERROR",
        )
        totals = dict.fromkeys(self.metrics, 0.0)
        for name, documents in prepared.subsets.items():
            entry = results["results"][f"{unit.task}_{name}"]
            for metric in self.metrics:
                totals[metric] += entry[f"{metric},none"] * len(documents)
        count = self.work(prepared, settings)
        on_step(count)
        metrics = {metric: total / count for metric, total in totals.items()}
        return Measurement(metrics=metrics, selection=metrics[self.metrics[0]], counts={"test": count})

    def configuration(self, name: str, documents: list[Document], examples: list[Document]) -> dict[str, Any]:
        """A task of lm-eval over the given documents; nothing is downloaded."""
        from datasets import Dataset

        splits = {"test": Dataset.from_list(documents)}
        configuration = {
            "task": name,
            "custom_dataset": lambda **_: splits,
            "test_split": "test",
            "num_fewshot": len(examples),
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in self.metrics
            ],
            **self.prompt,
        }
        if examples:
            splits["dev"] = Dataset.from_list(examples)
            configuration |= {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
        if "description" in configuration:
            configuration["description"] = configuration["description"].format(**documents[0])
        return configuration


def require_lm_eval() -> None:
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "cannot score: lm-eval is not installed - these tasks run through it - pip install 'capgap[eval]'"
        )


def read_json_lines(path: Path) -> list[Document]:
    """One JSON object per line."""
    documents = []
    for number, line in read_lines(path):
        if line.strip():
            try:
                documents.append(json.loads(line))
            except ValueError as error:
                refuse_line(path, number, f"not JSON ({error})", MEND_LINE)
    return non_empty(documents, path)


def read_questions(path: Path) -> list[Document]:
    """Questions with choices and the number of the right one: ARC's own lines, or prompts that list `Answer1: ...`."""
    if path.suffix == ".jsonl":
        questions = []
        for entry in read_json_lines(path):
            labels = [choice["label"] for choice in entry["question"]["choices"]]
            choices = [choice["text"] for choice in entry["question"]["choices"]]
            document = {
                "question": entry["question"]["stem"],
                "choices": choices,
                "gold": labels.index(entry["answerKey"]),
            }
            questions.append(document)
        return questions
    questions = []
    for i, entry in enumerate(read_json_array(path)):
        body = entry["instruction"].partition("question: ")[2]
        body = body.rpartition("\n\nAnswer format:")[0]
        question, *choices = re.split(r"\s*Answer\d+: ", body)
        gold = int(entry["answer"].removeprefix("answer")) - 1
        if not 0 <= gold < len(choices):
            raise DataError(f"cannot read task data: {path} (entry {i + 1}) - its answer is no choice - {MEND_LINE}")
        questions.append({"question": question, "choices": [choice.strip() for choice in choices], "gold": gold})
    return non_empty(questions, path)


def read_yes_no(path: Path) -> list[Document]:
    """Questions answered by yes or no, without the passage that answers them."""
    documents: list[Document] = []
    for entry in read_json_array(path):
        question = entry["instruction"].partition("question: ")[2].rpartition("\n\nAnswer format:")[0]
        documents.append({"question": question.strip().rstrip("?"), "gold": int(entry["answer"] == "true")})
    return non_empty(documents, path)


def read_blanks(path: Path) -> list[Document]:
    """Sentences with a blank and two words to fill it: WinoGrande."""
    documents: list[Document] = []
    for entry in read_json_array(path):
        match = re.search(
            r"sentence: (.*)\n\nOption1: (.*) Option2: (.*?) Answer format", entry["instruction"], re.DOTALL
        )
        if match is None:
            raise DataError(f"cannot read task data: {path} (entry {len(documents) + 1}) - no options - {MEND_LINE}")
        sentence, first, second = match.groups()
        before, _, after = sentence.partition("_")
        documents.append(
            {"starts": [before + first, before + second], "rest": after.strip(), "gold": int(entry["answer"][-1]) - 1}
        )
    return non_empty(documents, path)


def read_subject(path: Path) -> list[Document]:
    """Questions of one MMLU subject: question, four choices, the number of the right one."""
    subject = re.sub(r"_(test|dev)$", "", path.stem).replace("_", " ")
    documents: list[Document] = []
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            try:
                choices = [row[f"choice{i}"] for i in range(4)]
                document = {
                    "subject": subject,
                    "question": row["question"],
                    "choices": choices,
                    "gold": int(row["answer"]),
                }
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"cannot read task data: {path} (row {len(documents) + 1}) - {error} - {MEND_LINE}"
                ) from None
            documents.append(document)
    return non_empty(documents, path)


def read_json_array(path: Path) -> list[Document]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"cannot read task data: {path} - not JSON ({error}) - {MEND_LINE}") from None


def non_empty(documents: list[Document], path: Path) -> list[Document]:
    if not documents:
        raise DataError(f"cannot read task data: {path} - it holds no documents - {MEND_LINE}")
    return documents


# The prompts are those of lm-eval's tasks of the same name.
CHOICES = {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": "{{choices}}"}
QUESTION = CHOICES | {"doc_to_text": "Question: {{question}}\nAnswer:"}
ACCURACY_NORM = ("acc_norm", "acc")

LAMBADA = HarnessTask(
    "lambada/lambada_test.jsonl",
    "put LAMBADA there (OpenAI's de-tokenised file, one {text} per line)",
    read_json_lines,
    {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    },
    (Headline("LAMBADA acc", "acc"),),
)
BLIMP = HarnessTask(
    "blimp/data/*.jsonl",
    "get BLiMP's data folder from https://github.com/alexwarstadt/blimp",
    read_json_lines,
    {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
    },
    (Headline("BLiMP acc", "acc"),),
)
ARC_EASY = HarnessTask(
    "*/ARC-Easy*est.json*",
    "put ARC-Easy-Test.jsonl of https://allenai.org/data/arc into a folder there",
    read_questions,
    QUESTION,
    (Headline("ARC-Easy acc", "acc"),),
    metrics=("acc", "acc_norm"),
)
ARC_CHALLENGE = HarnessTask(
    "*/ARC-Challenge*est.json*",
    "put ARC-Challenge-Test.jsonl of https://allenai.org/data/arc into a folder there",
    read_questions,
    QUESTION,
    (Headline("ARC-Challenge acc norm", "acc_norm"),),
    metrics=ACCURACY_NORM,
)
OPENBOOKQA = HarnessTask(
    "llm_adapters/openbookqa.test.json",
    "put openbookqa/test.json of https://github.com/AGI-Edgerunners/LLM-Adapters there under that name",
    read_questions,
    CHOICES | {"doc_to_text": "{{question}}"},
    (Headline("OpenBookQA acc norm", "acc_norm"),),
    metrics=ACCURACY_NORM,
)
BOOLQ = HarnessTask(
    "llm_adapters/boolq.test.json",
    "put boolq/test.json of https://github.com/AGI-Edgerunners/LLM-Adapters there under that name",
    read_yes_no,
    {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}?\nAnswer:",
        "doc_to_target": "gold",
        "doc_to_choice": ["no", "yes"],
    },
    # That file has no passages: the numbers are lower than those of the usual open-book task.
    (Headline("BoolQ acc (no passage)", "acc"),),
)
WINOGRANDE = HarnessTask(
    "llm_adapters/winogrande.test.json",
    "put winogrande/test.json of https://github.com/AGI-Edgerunners/LLM-Adapters there under that name",
    read_blanks,
    # Both starts are scored by the same ending (partial evaluation): the target is the text, the choice the context.
    {
        "output_type": "multiple_choice",
        "doc_to_text": lambda document: document["gold"],
        "doc_to_target": "rest",
        "doc_to_choice": "{{starts}}",
    },
    (Headline("WinoGrande acc", "acc"),),
)
MMLU = HarnessTask(
    "mmlu/data/mmlu/test/*_test.csv",
    "unpack MMLU there, as mmlu/data/mmlu/test and dev with one CSV per subject",
    read_subject,
    {
        "output_type": "multiple_choice",
        "description": "The following are multiple choice questions (with answers) about {subject}.\n\n",
        "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
        "D. {{choices[3]}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "gold",
    },
    (Headline("MMLU acc", "acc"),),
    num_examples=5,
    examples_folder="dev",
)
