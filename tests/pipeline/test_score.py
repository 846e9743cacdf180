"""`capgap score` from its command line to scores.json, with small models on the bundled samples."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizerFast

from data_prep.errors import CheckpointError
from data_prep.files import watching_operations
from pipeline import score
from pipeline.eval_tasks.loading import ModelSource

SAMPLES = Path(__file__).parents[2] / "data_prep" / "samples"
SMALL = ["--max-train-examples", "24", "--max-eval-examples", "16", "--epochs", "1", "--batch-size", "8"]
SMALL += ["--throughput-batch-size", "2"]


def vocabulary() -> dict[str, int]:
    """Special tokens, the characters, and the 600 most frequent words of the samples."""
    text = (SAMPLES / "qnli" / "train.tsv").read_text(encoding="utf-8").lower()
    words = [word for word, _ in Counter(re.findall(r"[a-z]+", text)).most_common(600)]
    letters = sorted({character for character in text if not character.isspace()})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), *words]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def save_model(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    pieces = vocabulary()
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    BertTokenizerFast(vocab=pieces).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def scored(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one complete run over both kinds of task."""
    out = tmp_path_factory.mktemp("scored")
    assert run(model, out, "--seeds", "2", *SMALL) == 0
    return out


def run(
    model: Path | str, out: Path, *flags: str, tasks: tuple[str, ...] = ("qnli", "wikigold"), data: Path = SAMPLES
) -> int:
    return score.main(["--model", str(model), "--tasks", *tasks, "--data", str(data), "--out", str(out), *flags])


def scores_of(out: Path) -> dict:
    return json.loads((out / "scores.json").read_text(encoding="utf-8"))


def test_the_score_file_holds_means_intervals_counts_and_the_models_figures(scored):
    summary = scores_of(scored)
    (headline,) = summary["tasks"]["qnli"]["headlines"]
    assert headline["label"] == "QNLI acc"
    assert headline["mean"] == pytest.approx(sum(headline["values"]) / 2)
    assert headline["half_width_95"] >= 0
    assert headline["floor"] >= 0.5
    assert summary["tasks"]["qnli"]["counts"] == {"train": 24, "dev": 16, "malformed_rows_skipped": 0}
    assert summary["tasks"]["wikigold"]["counts"]["test"] == 16
    assert summary["tasks"]["qnli"]["settings"]["max_train_examples"] == 24
    assert summary["model"]["linear_macs_per_sequence"] == 128 * (4 * 32 * 32 + 2 * 32 * 64)
    assert summary["model"]["throughput"]["length"] == 128
    assert sorted(path.name for path in (scored / "scores").iterdir()) == [
        "model.json",
        "qnli-lr3e-05-seed1.json",
        "qnli-lr3e-05-seed2.json",
        "wikigold-lr5e-05-seed1.json",
        "wikigold-lr5e-05-seed2.json",
    ]


def test_a_repeated_command_measures_nothing_and_says_so(model, scored, capsys):
    before = scores_of(scored)
    assert run(model, scored, "--seeds", "2", *SMALL) == 0
    assert "4 of 4 measurements are complete" in capsys.readouterr().out
    assert scores_of(scored) == before


def test_another_seed_is_added_to_what_is_there(model, scored, tmp_path, capsys):
    out = tmp_path / "more"
    out.mkdir()
    copy_folder(scored / "scores", out / "scores")
    assert run(model, out, "--seeds", "3", *SMALL, tasks=("qnli",)) == 0
    assert "2 of 3 measurements are complete" in capsys.readouterr().out
    assert scores_of(out)["tasks"]["qnli"]["seeds"] == [1, 2, 3]


def copy_folder(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_a_second_task_joins_the_first_in_one_file(model, tmp_path):
    for task in ("wikigold", "qnli"):
        assert run(model, tmp_path, "--seeds", "1", *SMALL, tasks=(task,)) == 0
    assert list(scores_of(tmp_path)["tasks"]) == ["qnli", "wikigold"]


def test_the_same_seed_gives_the_same_numbers(model, scored, tmp_path):
    assert run(model, tmp_path, "--seeds", "1", *SMALL) == 0
    for name in ("qnli-lr3e-05-seed1.json", "wikigold-lr5e-05-seed1.json"):
        first, again = (json.loads((out / "scores" / name).read_text()) for out in (scored, tmp_path))
        assert first["losses"] == again["losses"]
        assert first["metrics"] == again["metrics"]


def test_different_seeds_train_differently(scored):
    losses = [
        json.loads((scored / "scores" / f"qnli-lr3e-05-seed{seed}.json").read_text())["losses"] for seed in (1, 2)
    ]
    assert losses[0] != losses[1]


def test_a_crash_between_two_seeds_loses_only_the_unfinished_one(model, tmp_path, capsys):
    class Crash(BaseException):
        pass

    def crash_at_second_result(operation: str, path: Path) -> None:
        if operation == "rename" and path.name == "qnli-lr3e-05-seed2.json":
            raise Crash

    with pytest.raises(Crash), watching_operations(crash_at_second_result):
        run(model, tmp_path, "--seeds", "2", *SMALL, tasks=("qnli",))
    assert not (tmp_path / "scores.json").exists()
    assert run(model, tmp_path, "--seeds", "2", *SMALL, tasks=("qnli",)) == 0
    assert "1 of 2 measurements are complete" in capsys.readouterr().out
    assert scores_of(tmp_path)["tasks"]["qnli"]["seeds"] == [1, 2]


def test_the_learning_rate_with_the_best_development_score_is_kept(model, tmp_path):
    flags = ["--seeds", "1", "--learning-rates", "1e-9", "3e-3", *SMALL, "--epochs", "3", "--max-train-examples", "64"]
    assert run(model, tmp_path, *flags, tasks=("qnli",)) == 0
    task = scores_of(tmp_path)["tasks"]["qnli"]
    selections = {
        rate: json.loads((tmp_path / "scores" / f"qnli-lr{rate:g}-seed1.json").read_text())["selection"]
        for rate in task["learning_rates_tried"]
    }
    assert sorted(selections) == [1e-9, 3e-3]
    assert selections[task["learning_rate"]] == max(selections.values())


def toy_data(folder: Path) -> Path:
    """Sentences whose class is a word in them, and entities that are always the same words."""
    sst2 = folder / "SST-2"
    sst2.mkdir(parents=True)
    rows = [
        f"it was a {'good' if i % 2 else 'new'} year for the {noun}\t{i % 2}"
        for i, noun in enumerate(["city", "state"] * 24)
    ]
    for name in ("train.tsv", "dev.tsv"):
        (sst2 / name).write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    wnut = folder / "wnut17"
    wnut.mkdir()
    sentence = (
        "the\tO\nuniversity\tB-group\nof\tI-group\nthe\tI-group\nstate\tI-group\nwas\tO\nin\tO\neurope\tB-location\n\n"
    )
    for name in ("train.conll", "dev.conll", "test.conll"):
        (wnut / name).write_text(sentence * 32, encoding="utf-8")
    return folder


def test_fine_tuning_learns_what_can_be_learned(model, tmp_path):
    data = toy_data(tmp_path / "data")
    flags = [
        "--seeds",
        "1",
        "--epochs",
        "12",
        "--batch-size",
        "8",
        "--learning-rates",
        "3e-3",
        "--throughput-batch-size",
        "0",
    ]
    assert run(model, tmp_path / "out", *flags, tasks=("sst2", "wnut17"), data=data) == 0
    tasks = scores_of(tmp_path / "out")["tasks"]
    assert tasks["sst2"]["headlines"][0]["mean"] == 1.0
    assert tasks["wnut17"]["headlines"][0]["mean"] == 1.0


def test_bf16_runs(model, tmp_path):
    assert run(model, tmp_path, "--seeds", "1", "--precision", "bf16", *SMALL, tasks=("wikigold",)) == 0
    assert scores_of(tmp_path)["tasks"]["wikigold"]["settings"]["precision"] == "bf16"


def test_a_task_can_have_a_learning_rate_of_its_own(model, tmp_path):
    assert run(model, tmp_path, "--seeds", "1", *SMALL, "--learning-rate-of", "wikigold", "2e-4") == 0
    tasks = scores_of(tmp_path)["tasks"]
    assert (tasks["qnli"]["learning_rate"], tasks["wikigold"]["learning_rate"]) == (3e-5, 2e-4)


def test_dropout_is_that_of_the_settings_whatever_the_model_says(model):
    from transformers import AutoModelForTokenClassification

    source = ModelSource.find(str(model), trust_remote_code=False)
    network = source.model(AutoModelForTokenClassification, device=torch.device("cpu"), **source.dropout(0.25))
    assert {module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}


def refused(capsys: pytest.CaptureFixture, code: int, expected_code: int, *parts: str) -> None:
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == expected_code
    assert message.startswith("error: ")
    for part in parts:
        assert part in message


def test_an_unknown_task_gets_a_suggestion(model, tmp_path, capsys):
    refused(capsys, run(model, tmp_path, tasks=("SST-2x",)), 2, "--tasks (SST-2x)", "did you mean sst2?")
    refused(capsys, run(model, tmp_path, tasks=("nothing",)), 2, "choose from glue ner")
    refused(capsys, run(model, tmp_path, "--learning-rate-of", "wikigol", "1e-4"), 2, "did you mean wikigold?")


def test_missing_task_data_is_refused_before_anything_runs(model, tmp_path, capsys):
    code = run(model, tmp_path / "out", tasks=("qnli", "rte"))
    refused(capsys, code, 3, "RTE - no such folder", "gluebenchmark.com")
    assert not (tmp_path / "out").exists()


def test_malformed_task_data_names_file_and_line(model, tmp_path, capsys):
    data = toy_data(tmp_path / "data")
    path = data / "SST-2" / "dev.tsv"
    path.write_text(path.read_text() + "no label here\n", encoding="utf-8")
    code = run(model, tmp_path / "out", tasks=("sst2",), data=data)
    refused(capsys, code, 3, "dev.tsv:50 - 1 columns instead of 2", "--max-malformed 1")


def test_other_settings_in_the_same_folder_are_refused_by_name(model, scored, capsys):
    code = run(model, scored, "--seeds", "2", *SMALL[:-4], "--batch-size", "4")
    refused(capsys, code, 2, "batch_size (4)", "scored with batch_size 8", "choose another --out")


def test_rows_longer_than_the_models_positions_are_refused(model, tmp_path, capsys):
    refused(capsys, run(model, tmp_path, "--max-length", "256"), 2, "--max-length (256)", "has 128 positions")


def test_another_model_in_the_same_folder_is_refused(scored, tmp_path, capsys):
    other = save_model(tmp_path / "other", seed=1)
    refused(capsys, run(other, scored, "--seeds", "2", *SMALL), 2, "another model", "choose another --out")


def test_a_model_folder_without_its_weights_is_refused(model, tmp_path, capsys):
    folder = tmp_path / "broken"
    copy_folder(model, folder)
    (folder / "model.safetensors").unlink()
    refused(capsys, run(folder, tmp_path / "out", *SMALL), 3, "model.safetensors")
    refused(capsys, run(tmp_path / "nowhere", tmp_path / "out", *SMALL), 3, "nowhere")


@pytest.mark.fault(30)
def test_code_that_comes_with_a_model_needs_permission(model, tmp_path, capsys):
    folder = tmp_path / "custom"
    copy_folder(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "own_code.Model"}}))
    (folder / "own_code.py").write_text("raise SystemExit('ran')")
    refused(capsys, run(folder, tmp_path / "out", *SMALL), 2, "auto_map", "--trust-remote-code")


def test_a_checkpoint_that_lacks_encoder_weights_is_refused(model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "partial"
    copy_folder(model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.0.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    source = ModelSource.find(str(folder), trust_remote_code=False)
    from transformers import AutoModel, AutoModelForSequenceClassification

    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(CheckpointError, match=r"encoder\.layer\.0\.output\.dense\.weight, 1 tensors in all"):
            source.model(auto_class, device=torch.device("cpu"))


def test_a_pretraining_head_in_the_checkpoint_does_no_harm(tmp_path):
    torch.manual_seed(0)
    folder = save_model(tmp_path / "masked")
    config = BertConfig.from_pretrained(folder)
    BertForMaskedLM(config).save_pretrained(folder)
    assert run(folder, tmp_path / "out", "--seeds", "1", *SMALL, tasks=("qnli",)) == 0


def test_the_glue_score_is_the_mean_of_the_headlines_of_each_seed(tmp_path):
    tasks = {name: score.TASKS[name] for name in score.GROUPS["glue"]}
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "model.json").write_text('{"fingerprint": "f"}')
    results = []
    for i, (name, task) in enumerate(tasks.items()):
        for seed in (1, 2):
            metrics = {headline.metric: 0.5 + 0.05 * i + 0.01 * seed for headline in task.headlines}
            metrics |= {headline.floor_metric: 0.5 for headline in task.headlines if headline.floor_metric}
            unit = score.Unit(name, seed=seed, learning_rate=3e-5)
            results.append(score.Result(unit=unit, metrics=metrics, selection=0.0, counts={}, settings={}, seconds=1.0))
    summary = score.summarise(tasks, results, out=tmp_path)
    per_task = [0.5 + 0.05 * i for i in (0, 1, 2, 3, 4, 4, 5, 6)]  # MNLI counts twice, matched and mismatched
    assert summary["glue_score"]["values"] == pytest.approx([sum(per_task) / 8 + 0.01, sum(per_task) / 8 + 0.02])
