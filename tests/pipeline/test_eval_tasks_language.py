"""Held-out text and benchmarks for causal language models, with a tiny model built here."""

import importlib.util
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from data_prep.errors import ConfigError, DataError
from pipeline import score
from pipeline.eval_tasks import TASKS, harness
from pipeline.eval_tasks.perplexity import PERPLEXITY, refuse_other_vocabulary, windows
from pipeline.eval_tasks.settings import EvalSettings

TEXT = "The Rhine rises in the Alps.\nIt flows north – past Köln – to the sea.\n" * 6
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra [eval])"
)


def save_language_model(folder: Path, *, seed: int = 0, vocab_size: int = 257) -> Path:
    """A byte-level LLaMA with one token per byte, so that bits per byte can be counted by hand."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)} | {"<s>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        bos_token_id=256,
        eos_token_id=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("models") / "bytes")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "perplexity").mkdir()
    (tmp_path / "perplexity" / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def run(model: Path, data: Path, *flags: str) -> int:
    return score.main(
        ["--model", str(model), "--data", str(data), "--out", str(data / "out"), "--throughput-batch-size", "0", *flags]
    )


def metrics_of(data: Path, task: str) -> dict[str, float]:
    entry = json.loads((data / "out" / "scores.json").read_text(encoding="utf-8"))["tasks"][task]
    return {name: interval["mean"] for name, interval in entry["metrics"].items()}


@pytest.mark.parametrize("start", [None, 9])
@pytest.mark.parametrize("length", [2, 3, 8, 100])
@pytest.mark.parametrize("count", [2, 7, 8, 23])
def test_every_token_is_scored_once_with_half_a_window_before_it(count, length, start):
    ids = np.arange(100, 100 + count)
    scored: list[int] = []
    for block in windows(ids, length=length, start_id=start):
        assert len(block.ids) <= length
        scored += block.ids[block.first_scored :].tolist()
        assert block.first_scored >= 1
        if scored[0] not in block.ids:
            assert block.first_scored >= length // 2
    assert scored == ids[0 if start is not None else 1 :].tolist()


def test_bits_per_byte_are_those_counted_by_hand(model, data):
    assert run(model, data, "--tasks", "perplexity", "--max-length", "4096") == 0
    ids = PreTrainedTokenizerFast.from_pretrained(model)("<s>" + TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits[0, :-1]
    nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    num_bytes = len(TEXT.encode())
    metrics = metrics_of(data, "perplexity")
    assert metrics["bits_per_byte"] == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(nll / num_bytes), rel=1e-5)


def test_short_windows_cover_the_same_bytes(model, data):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    for length in (16, 33):
        prepared = PERPLEXITY.prepare(data, tokenizer, EvalSettings(max_length=length))
        assert prepared.num_tokens == prepared.num_bytes == len(TEXT.encode())


def test_a_part_of_the_text_counts_its_own_bytes(model, data):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    prepared = PERPLEXITY.prepare(data, tokenizer, EvalSettings(max_length=17, max_eval_examples=3))
    assert prepared.num_tokens == prepared.num_bytes == 16 + 8 + 8


def test_a_model_agrees_with_itself(model, data):
    assert run(model, data, "--tasks", "agreement", "--teacher", str(model)) == 0
    metrics = metrics_of(data, "agreement")
    assert metrics["teacher_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["teacher_top1"] == 1.0


def test_a_padded_vocabulary_is_compared_over_the_real_tokens(model, data, tmp_path):
    padded = save_language_model(tmp_path / "padded", vocab_size=320)
    assert run(model, data, "--tasks", "agreement", "--teacher", str(padded)) == 0
    assert metrics_of(data, "agreement")["teacher_kl"] > 0


def test_a_teacher_that_changed_under_its_name_is_not_mixed_in(model, data, tmp_path, capsys):
    teacher = save_language_model(tmp_path / "teacher", seed=1)
    assert run(model, data, "--tasks", "agreement", "--teacher", str(teacher)) == 0
    save_language_model(teacher, seed=2)
    assert run(model, data, "--tasks", "agreement", "--teacher", str(teacher)) == 2
    assert "cannot resume" in capsys.readouterr().err


def test_agreement_needs_a_teacher(model, data, capsys):
    assert run(model, data, "--tasks", "agreement") == 2
    assert "--teacher is missing" in capsys.readouterr().err


def test_a_teacher_of_another_vocabulary_is_refused_with_examples():
    with pytest.raises(ConfigError, match=r"2 tokens differ, such as 'b', 'c'"):
        refuse_other_vocabulary({"a": 0, "b": 1}, {"a": 0, "c": 1}, "teacher")


def test_a_language_model_without_its_head_is_refused(model, data, tmp_path, capsys):
    folder = save_language_model(tmp_path / "headless")
    LlamaModel.from_pretrained(model).save_pretrained(folder)
    assert run(folder, data, "--tasks", "perplexity") == 4
    assert "lm_head.weight" in capsys.readouterr().err


def test_missing_text_is_named(model, tmp_path, capsys):
    assert run(model, tmp_path, "--tasks", "perplexity") == 3
    assert "perplexity/text.txt" in capsys.readouterr().err


def write_benchmarks(data: Path) -> None:
    """A few documents of each benchmark in the layout of its files."""
    adapters = data / "llm_adapters"
    adapters.mkdir()
    question = "Please choose the correct answer to the question: What is wet?\n\nAnswer1: water Answer2: sand"
    question += "\n\nAnswer format: answer1/answer2"
    (adapters / "ARC-Easy.test.json").write_text(json.dumps([{"instruction": question, "answer": "answer1"}] * 4))
    (adapters / "openbookqa.test.json").write_text(json.dumps([{"instruction": question, "answer": "answer1"}] * 4))
    own = {
        "question": {
            "stem": "What is wet?",
            "choices": [{"label": "A", "text": "water"}, {"label": "B", "text": "sand"}],
        }
    }
    (adapters / "ARC-Challenge-Test.jsonl").write_text(json.dumps(own | {"answerKey": "B"}) + "\n")
    yes_no = (
        "Please answer the following question with true or false, question: is water wet?\n\nAnswer format: true/false"
    )
    (adapters / "boolq.test.json").write_text(json.dumps([{"instruction": yes_no, "answer": "true"}] * 3))
    blank = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    blank += "The cup and the bag: _ broke.\n\nOption1: cup Option2: bag Answer format: option1/option2"
    (adapters / "winogrande.test.json").write_text(json.dumps([{"instruction": blank, "answer": "option2"}] * 2))
    (data / "lambada").mkdir()
    (data / "lambada" / "lambada_test.jsonl").write_text(json.dumps({"text": "he gave the dog a bone"}) + "\n")
    (data / "blimp" / "data").mkdir(parents=True)
    pair = json.dumps({"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps."}) + "\n"
    for name in ("first", "second"):
        (data / "blimp" / "data" / f"{name}.jsonl").write_text(pair * 3)
    for part, rows in (("test", 3), ("dev", 5)):
        folder = data / "mmlu" / "data" / "mmlu" / part
        folder.mkdir(parents=True)
        lines = ["question,choice0,choice1,choice2,choice3,answer", *["What is wet?,water,sand,fire,air,0"] * rows]
        (folder / f"high_school_physics_{part}.csv").write_text("\n".join(lines) + "\n")


def test_benchmark_files_become_documents(data):
    write_benchmarks(data)
    documents = {
        name: TASKS[name].read(TASKS[name].question_files(data)[0])
        for name in ("arc_easy", "arc_challenge", "boolq", "winogrande", "mmlu")
    }
    assert documents["arc_easy"][0] == {"question": "What is wet?", "choices": ["water", "sand"], "gold": 0}
    assert documents["arc_challenge"] == [{"question": "What is wet?", "choices": ["water", "sand"], "gold": 1}]
    assert documents["boolq"][0] == {"question": "is water wet", "gold": 1}
    starts = ["The cup and the bag: cup", "The cup and the bag: bag"]
    assert documents["winogrande"][0] == {"starts": starts, "rest": "broke.", "gold": 1}
    assert documents["mmlu"][0]["subject"] == "high school physics"


def test_a_subject_without_its_solved_examples_is_named(data):
    write_benchmarks(data)
    (data / "mmlu" / "data" / "mmlu" / "dev" / "high_school_physics_dev.csv").unlink()
    with pytest.raises(DataError, match=r"dev/high_school_physics_dev\.csv - file is missing"):
        TASKS["mmlu"].files(data)


def test_a_damaged_benchmark_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "lambada_test.jsonl"
    path.write_text('{"text": "fine"}\nbroken\n')
    with pytest.raises(DataError, match=r"lambada_test\.jsonl:2 - not JSON"):
        harness.read_json_lines(path)


def test_without_lm_eval_its_tasks_name_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'capgap\[eval\]'"):
        harness.require_lm_eval()


@needs_lm_eval
def test_every_benchmark_runs_through_lm_eval(model, data):
    write_benchmarks(data)
    names = ["lambada", "blimp", "arc_easy", "arc_challenge", "openbookqa", "boolq", "winogrande", "mmlu"]
    assert run(model, data, "--tasks", *names, "--batch-size", "4") == 0
    summary = json.loads((data / "out" / "scores.json").read_text(encoding="utf-8"))["tasks"]
    assert {name: summary[name]["counts"]["test"] for name in names} == dict(
        zip(names, (1, 6, 4, 1, 4, 3, 2, 3), strict=True)
    )
    assert all(0 <= headline["mean"] <= 1 for task in summary.values() for headline in task["headlines"])


@needs_lm_eval
def test_the_choice_that_the_model_finds_likelier_decides(model, data):
    write_benchmarks(data)
    assert run(model, data, "--tasks", "blimp") == 0
    tokenizer, network = (
        PreTrainedTokenizerFast.from_pretrained(model),
        LlamaForCausalLM.from_pretrained(model, dtype=torch.float32),
    )

    def log_likelihood(text: str) -> float:
        ids = tokenizer("<s>" + text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = network(ids).logits[0, :-1]
        return -torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()

    expected = float(log_likelihood("Cats sleep.") > log_likelihood("Cats sleeps."))
    assert metrics_of(data, "blimp")["acc"] == expected


# Sizes that the publishers of the sets state.
OFFICIAL = {
    "lambada": 5153,
    "blimp": 67000,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "openbookqa": 500,
    "boolq": 3270,
    "winogrande": 1267,
    "mmlu": 14042,
}


@pytest.mark.skipif("CAPGAP_DATA" not in os.environ, reason="CAPGAP_DATA names no folder of unpacked task data")
@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_benchmarks_read_in_full(name):
    task = TASKS[name]
    try:
        paths = task.question_files(Path(os.environ["CAPGAP_DATA"]))
    except DataError as error:
        pytest.skip(str(error))
    assert sum(len(task.read(path)) for path in paths) == OFFICIAL[name]
