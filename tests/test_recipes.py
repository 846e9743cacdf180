"""Every recipe and ds_config that we ship: read, checked and built."""

import json
from pathlib import Path

import pytest

from launching import PROJECT
from pipeline.config import DS_CONFIG_OWNED, load_ds_config, load_run_config

RECIPES = sorted((PROJECT / "pipeline" / "recipes").glob("*.yaml"))
DS_CONFIGS = sorted((PROJECT / "ds_configs").glob("*.json"))
BERT_BASE = {"vocab_size": 30522, "max_position_embeddings": 512, "hidden_size": 768}


def name_of(path: Path) -> str:
    return path.stem


def test_there_are_recipes_and_ds_configs():
    assert {"demo-dense", "demo-minimoe", "minimoe-3l-384h"} <= {path.stem for path in RECIPES}
    assert {"zero0", "zero1", "zero2"} <= {path.stem for path in DS_CONFIGS}


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_is_whole_and_its_batch_can_be_cut_for_the_ranks_that_it_names(path):
    config = load_run_config(path, [])
    ranks = int(path.read_text(encoding="utf-8").partition("--num_gpus ")[2].split()[0])
    assert config.batch.accumulation_steps(ranks) >= 1
    assert config.num_steps(10**7) >= 1
    load_ds_config(config.engine.ds_config)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_opens_with_what_it_is_and_the_command_that_runs_it(path):
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("# ")
    assert second.startswith("# ") and f"--config pipeline/recipes/{path.name}" in second


def test_no_two_recipes_write_into_the_same_folder():
    folders = [load_run_config(path, []).out for path in RECIPES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_the_student_of_a_recipe_can_be_built_and_learns_relations_of_its_teachers_heads(path):
    config = load_run_config(path, [])
    if config.student.architecture == "decoder":
        pytest.skip("decoders of billions of parameters are built by their own tests, at a smaller size")
    from data_prep.model_folders import find_model_folder, read_model_config
    from pipeline.models.sizes import num_parameters
    from pipeline.models.students import build_student

    assert config.teacher.model is not None
    folder, teacher_config = None, BERT_BASE
    if config.teacher.model.startswith("package:"):
        pytest.importorskip(config.teacher.model.removeprefix("package:"), reason="the [demo] extra is not installed")
        folder = find_model_folder(config.teacher.model)
        teacher_config = read_model_config(folder)
    init_folder = folder if config.student.init_from == "teacher" else None
    student = build_student(config.student, teacher_config=teacher_config, init_folder=init_folder, seed=0)
    # The sizes that the papers print, for the students that have them.
    expected = {"minilm-3l-384h": 17_241_984, "minimoe-3l-384h": 27_880_716}
    if path.stem in expected:
        assert num_parameters(student.served_model()) == expected[path.stem]
    for width in (teacher_config["hidden_size"], config.student.hidden_size):
        assert width % config.loss.num_relation_heads == 0


@pytest.mark.parametrize("path", DS_CONFIGS, ids=name_of)
def test_a_ds_config_is_read_and_repeats_nothing_of_the_recipe(path):
    settings = load_ds_config(f"ds_configs/{path.name}")
    assert settings == json.loads(path.read_text(encoding="utf-8"))
    assert not settings.keys() & DS_CONFIG_OWNED.keys()
    assert settings["zero_optimization"]["stage"] in (0, 1, 2, 3)
    if path.stem in ("zero0", "zero1", "zero2", "zero3"):
        assert settings["zero_optimization"]["stage"] == int(path.stem[-1])
