"""What a user gets wrong: one line that names the file or key and the mend, an exit code, and no traceback."""

import importlib.util
import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data_prep.files import write_json
from data_prep.shards import open_shards, read_manifest, write_manifest
from launching import PROJECT, environment
from pipeline import cli
from pipeline.config import load_run_config
from tiny_runs import VOCABULARY, write_rows, write_teacher, write_tokenizer


@pytest.fixture(autouse=True)
def alone_and_offline(monkeypatch):
    """No launcher's variables, and no hub: a missing model must not wait for the network."""
    import huggingface_hub.constants

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def refused(recipe, capsys):
    """Runs `capgap distill` on the tiny recipe with flags, expects an exit code, and returns the one line."""

    def refused(code: int, *flags: str) -> str:
        capsys.readouterr()
        # Should a check let something through, the plan is printed and nothing is trained.
        assert cli.main(["distill", "--config", str(recipe), *flags, "--dry-run"]) == code
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        assert "Traceback" not in captured.err and captured.out == ""
        return captured.err

    return refused


def test_missing_shards_are_named_with_the_command_that_makes_them(refused, tmp_path):
    assert f"{tmp_path / 'none'}" in refused(3, "--data.shards", str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "capgap prepare" in refused(3, "--data.shards", str(tmp_path / "empty"))


@pytest.mark.fault(8)
def test_shards_without_one_of_their_files_name_it(refused, tmp_path, shards_folder, injected):
    files = sorted(path.name for path in shards_folder.iterdir() if path.is_file())
    injected(len(files))
    for file in files:
        copied = shutil.copytree(shards_folder, tmp_path / f"without {file}")
        (copied / file).unlink()
        assert file in refused(3, "--data.shards", str(copied))


@pytest.mark.fault(24)
def test_fewer_rows_than_a_global_batch_are_an_error_with_both_numbers(refused):
    line = refused(2, "--batch.global_size", "128", "--batch.micro_size", "4")
    assert "batch.global_size (128)" in line and "96 rows" in line


def test_a_global_batch_that_does_not_divide_names_the_nearest_that_do(refused):
    line = refused(2, "--batch.global_size", "18")
    assert "batch.global_size (18)" in line and "16 or 20" in line


@pytest.mark.fault(16)
def test_permuted_vocabularies_are_noticed_with_examples(refused, tmp_path):
    permuted = [*VOCABULARY[:5], *reversed(VOCABULARY[5:])]
    folder = write_rows(tmp_path / "permuted", vocabulary=permuted)
    line = refused(3, "--data.shards", str(folder))
    assert "194 of 200 tokens" in line or "195 of 200" in line or "of 200 tokens" in line
    assert "'word194' 5 -> 199" in line and "--tokenizer" in line


@pytest.mark.fault(16)
def test_a_teacher_with_fewer_tokens_than_the_shards_is_refused_and_one_with_more_is_not(
    tmp_path, teacher_folder, recipe, capsys, injected
):
    injected(2)
    folder = write_rows(tmp_path / "more", vocabulary=[*VOCABULARY, "extra"])
    assert cli.main(["distill", "--config", str(recipe), "--data.shards", str(folder), "--dry-run"]) == 3
    error = capsys.readouterr().err
    assert "'extra' 200 -> None" in error and "vocab_size (200)" in error
    padded = shutil.copytree(teacher_folder, tmp_path / "padded")
    write_tokenizer(padded, [*VOCABULARY, "extra"])
    assert cli.main(["distill", "--config", str(recipe), "--teacher.model", str(padded), "--dry-run"]) == 0


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "vocab.txt"])
@pytest.mark.fault(15)
def test_a_teacher_folder_without_one_of_its_files_names_it(refused, tmp_path, teacher_folder, file):
    copied = shutil.copytree(teacher_folder, tmp_path / "teacher")
    (copied / file).unlink()
    line = refused(3, "--teacher.model", str(copied))
    assert file in line or (file == "vocab.txt" and "tokenizer" in line)
    assert str(copied) in line


@pytest.mark.fault(15)
def test_every_file_of_a_sharded_teacher_is_asked_for(refused, tmp_path, teacher_folder, injected):
    from transformers import BertModel

    folder = shutil.copytree(teacher_folder, tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    BertModel.from_pretrained(teacher_folder, add_pooling_layer=False).save_pretrained(folder, max_shard_size="40KB")
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) >= 2
    injected(len(parts) + 1)
    for part in parts:
        part.rename(tmp_path / "away")
        assert part.name in refused(3, "--teacher.model", str(folder))
        (tmp_path / "away").rename(part)
    (folder / "model.safetensors.index.json").write_text("{", encoding="utf-8")
    assert "model.safetensors.index.json" in refused(3, "--teacher.model", str(folder))


@pytest.mark.parametrize("content", ["", "{", "[]"])
@pytest.mark.fault(15)
def test_a_teacher_config_that_is_no_json_object_is_named(refused, tmp_path, teacher_folder, content):
    copied = shutil.copytree(teacher_folder, tmp_path / "teacher")
    (copied / "config.json").write_text(content, encoding="utf-8")
    assert "config.json" in refused(3, "--teacher.model", str(copied))


@pytest.mark.fault(15)
def test_a_teacher_that_is_nowhere_is_answered_with_how_to_get_it(refused, tmp_path, injected):
    injected(3)
    assert "no such folder" in refused(3, "--teacher.model", str(tmp_path / "none"))
    line = refused(3, "--teacher.model", "nobody/no-such-model")
    assert "nobody/no-such-model" in line and "hf download nobody/no-such-model" in line
    assert "pip install no-such-package" in refused(3, "--teacher.model", "package:no_such_package")


@pytest.mark.fault(30)
def test_remote_code_of_the_hub_needs_a_pinned_revision(recipe, capsys):
    flags = ["--teacher.model", "nobody/model", "--teacher.trust_remote_code", "true", "--dry-run"]
    assert cli.main(["distill", "--config", str(recipe), *flags]) == 2
    assert "pin teacher.revision" in capsys.readouterr().err


class Payload:
    """Pickled, it creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.fault(30)
def test_a_teacher_that_is_a_pickle_is_refused_and_a_pickle_beside_the_weights_is_not_opened(
    refused, recipe, tmp_path, teacher_folder, injected
):
    injected(2)
    marker, folder = tmp_path / "ran", shutil.copytree(teacher_folder, tmp_path / "teacher")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    assert cli.main(["distill", "--config", str(recipe), "--teacher.model", str(folder), "--dry-run"]) == 0
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin is a pickle" in refused(3, "--teacher.model", str(folder))
    assert not marker.exists()


@pytest.fixture
def armed_teacher(tmp_path, teacher_folder) -> Path:
    """A teacher whose own code creates a file called `ran` beside it."""
    folder = shutil.copytree(teacher_folder, tmp_path / "armed")
    code = f"""open({str(tmp_path / "ran")!r}, "w").close()
from transformers import BertConfig, BertModel, BertTokenizer
class Config(BertConfig):
    model_type = "armed"
class Model(BertModel):
    config_class = Config
class Tokenizer(BertTokenizer):
    pass
"""
    (folder / "armed.py").write_text(code, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto_map = {"AutoConfig": "armed.Config", "AutoModel": "armed.Model"}
    write_json(folder / "config.json", config | {"model_type": "armed", "auto_map": auto_map})
    tokenizer = {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["armed.Tokenizer", None]}}
    write_json(folder / "tokenizer_config.json", tokenizer | {"do_lower_case": True})
    return folder


@pytest.mark.fault(30)
def test_code_of_a_teacher_runs_only_when_the_recipe_trusts_it(
    refused, recipe, tmp_path, teacher_folder, shards_folder, armed_teacher, injected, capsys
):
    injected(6)
    ran = tmp_path / "ran"
    assert "teacher.trust_remote_code" in refused(2, "--teacher.model", str(armed_teacher))
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "word1 word2 word3. " * 20}), encoding="utf-8")
    commands = [
        ["distill", "--config", str(recipe), "--student.init_from", str(armed_teacher), "--dry-run"],
        ["cache", "--teacher", str(armed_teacher), "--shards", str(shards_folder), "--out", str(tmp_path / "a")],
        ["upcycle", "--model", str(armed_teacher), "--num-experts", "2", "--out", str(tmp_path / "b")],
        ["prune", "--model", str(armed_teacher), "--shards", str(shards_folder), "--num-layers", "1",
         "--out", str(tmp_path / "c")],
        ["prepare", "--source", str(text), "--tokenizer", str(armed_teacher), "--out", str(tmp_path / "d")],
    ]  # fmt: skip
    for command in commands:
        code = run_quietly(command)
        assert not ran.exists(), command
        # A tokenizer is read from its files, whatever class it names.
        assert (code == 0) == (command[0] == "prepare"), command

    trusted = ["distill", "--config", str(recipe), "--teacher.model", str(armed_teacher), "--dry-run"]
    trusted += ["--teacher.trust_remote_code", "true"]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *trusted],
        cwd=PROJECT, env=environment(HF_HOME=str(tmp_path / "cache")), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ran.exists(), "the payload does nothing, so this test shows nothing"


def run_quietly(command: list[str]) -> int:
    try:
        return cli.main(command)
    except Exception:  # What matters here is what did not run.
        return 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--student.num_expert", "4"], "flag --student.num_expert: unknown key student.num_expert - did you mean"),
        (["--stpes", "4"], "did you mean steps?"),
        (["--engine.ds_config", "ds_configs/none.json"], "engine.ds_config not found"),
        (["--loss.num_relation_heads", "5"], "loss.num_relation_heads (5) does not divide the teacher's width (32)"),
        (["--student.init_layers", "[0,1]"], "without student.init_from"),
        (["--student.init_from", "teacher", "--student.init_layers", "[0,3]"], "must name 2 layers from 0 to 2"),
        (["--student.init_from", "teacher", "--student.num_hidden_layers", "4"], "more than student.init_from has (3)"),
        (["--epochs", "1"], "give exactly one of steps (6) and epochs (1.0)"),
        (["--student.num_attention_heads", "0"], "student.num_attention_heads (0)"),
    ],
)
def test_a_wrong_choice_is_one_line_that_names_the_key(refused, flags, expected):
    assert expected in refused(2, *flags)


def test_rows_of_another_kind_or_longer_than_the_teacher_are_refused(refused, tmp_path, shards_folder):
    copied = shutil.copytree(shards_folder, tmp_path / "rows")
    write_manifest(copied, replace(read_manifest(copied), rows="lm-blocks"))
    assert "--rows bert-pairs" in refused(3, "--data.shards", str(copied))
    short = write_teacher(tmp_path / "short")
    config = json.loads((short / "config.json").read_text(encoding="utf-8"))
    write_json(short / "config.json", config | {"max_position_embeddings": 8})
    assert "teacher has 8 positions" in refused(3, "--teacher.model", str(short))


def test_several_mistakes_are_told_at_once(recipe, capsys, tmp_path):
    flags = ["--data.shards", str(tmp_path / "none"), "--batch.global_size", "18", "--engine.ds_config", "none.json"]
    code = cli.main(["distill", "--config", str(recipe), *flags])
    error = capsys.readouterr().err
    assert code in (2, 3)
    assert "none" in error and "batch.global_size (18)" in error and "engine.ds_config not found" in error
    assert "Traceback" not in error


@pytest.fixture
def begun(recipe) -> Path:
    """A run folder whose record says what began in it."""
    config = load_run_config(recipe, [])
    fingerprint = open_shards(config.data.shards).manifest.fingerprint
    run = Path(config.out)
    run.mkdir()
    write_json(run / "run.json", {"config": asdict(config), "data_fingerprint": fingerprint})
    return run


@pytest.mark.fault(19)
def test_an_output_folder_of_another_config_is_refused_key_by_key(refused, begun, injected):
    injected(2)
    line = refused(2, "--student.num_experts", "2", "--optimizer.learning_rate", "2e-3")
    assert f"out: {begun}" in line
    assert "student.num_experts (4 -> 2)" in line and "optimizer.learning_rate (0.001 -> 0.002)" in line
    assert "--out" in line


@pytest.mark.fault(19)
def test_an_output_folder_of_other_data_is_refused(refused, begun, tmp_path):
    other = write_rows(tmp_path / "other", seed=9)
    assert f"the content of {other}" in refused(2, "--data.shards", str(other))


def test_a_damaged_record_of_the_run_is_named(refused, begun):
    (begun / "run.json").write_text("{", encoding="utf-8")
    assert "run.json" in refused(3)


def test_a_complete_run_is_left_as_it_is_and_says_so(recipe, begun, capsys):
    write_json(begun / "DONE", {"step": 6})
    before = sorted(path.name for path in begun.iterdir())
    assert cli.main(["distill", "--config", str(recipe), "--log.every_steps", "7"]) == 0
    assert "complete already" in capsys.readouterr().out
    assert sorted(path.name for path in begun.iterdir()) == before


def test_a_dry_run_prints_config_sizes_and_memory_and_writes_nothing(recipe, capsys):
    assert cli.main(["distill", "--config", str(recipe), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "num_experts: 4",
        "parameters_training",
        "linear_macs_per_sequence",
        "16 rows x 16",
        "memory per rank",
    ):
        assert part in shown
    assert not (recipe.parent / "run").exists()


def test_paths_with_spaces_and_letters_of_any_script_work(tmp_path, teacher_folder, shards_folder, recipe, capsys):
    folder = tmp_path / "ü 日本"
    shutil.copytree(teacher_folder, folder / "teacher")
    shutil.copytree(shards_folder, folder / "rows")
    flags = ["--teacher.model", str(folder / "teacher"), "--data.shards", str(folder / "rows")]
    assert cli.main(["distill", "--config", str(recipe), *flags, "--out", str(folder / "run"), "--dry-run"]) == 0


@pytest.mark.parametrize("kept", [0, 5, 500, -1])
@pytest.mark.fault(15)
def test_a_teacher_whose_weights_are_cut_short_is_one_line(refused, tmp_path, teacher_folder, kept):
    copied = shutil.copytree(teacher_folder, tmp_path / "teacher")
    weights = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(weights[:kept])
    assert f"{copied / 'model.safetensors'}: " in refused(3, "--teacher.model", str(copied))


# The command itself


def test_an_unknown_job_is_answered_with_the_one_that_was_meant(capsys):
    assert cli.main(["distil"]) == 2
    assert capsys.readouterr().err == "error: unknown job distil - did you mean distill?\n"
    assert cli.main(["xyz"]) == 2
    assert "jobs are prepare" in capsys.readouterr().err


def test_the_command_alone_lists_the_jobs(capsys):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {job} " in shown for job in cli.JOBS)


@pytest.mark.parametrize("job", cli.JOBS)
def test_every_job_that_is_listed_exists(job):
    spec = importlib.util.find_spec(cli.JOBS[job][0])
    assert spec is not None and spec.origin is not None
    assert "\ndef main(argv: list[str] | None = None) -> int:" in Path(spec.origin).read_text(encoding="utf-8")


def test_help_of_distill_shows_every_field_and_a_missing_recipe_shows_the_usage(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["distill", "--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert "--student.num-experts" in shown and "--optimizer.learning-rate" in shown
    with pytest.raises(SystemExit) as left:
        cli.main(["distill"])
    assert left.value.code == 2


def test_the_console_script_is_the_command():
    text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'capgap = "pipeline.cli:main"' in text
