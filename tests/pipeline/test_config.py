"""Mistakes in a recipe, a flag or a ds_config: each is refused, and the message says where it is and what was meant."""

import importlib.util
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import ConfigError
from launching import PROJECT, environment
from pipeline.config import (
    DS_CONFIG_KEYS,
    DS_CONFIG_OWNED,
    BatchConfig,
    EngineConfig,
    LogConfig,
    RunConfig,
    changed_keys,
    known_keys,
    load_ds_config,
    load_run_config,
)

WHOLE = "out: run\nsteps: 1\ndata: {shards: rows}\nteacher: {model: folder}\n"


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message(recipe: Path, *flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_config(recipe, list(flags))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def typos(word: str) -> list[str]:
    """Every character once: deleted, doubled or swapped with the next, in turn."""
    found = []
    for place in range(len(word)):
        deleted = word[:place] + word[place + 1 :]
        doubled = word[: place + 1] + word[place:]
        swapped = word[:place] + word[place : place + 2][::-1] + word[place + 2 :]
        found.append((deleted, doubled, swapped)[place % 3])
    return [typo for typo in found if typo not in (word, "")]


class Suggestions:
    """Counts how often a refused key is answered with the key that was meant."""

    def __init__(self) -> None:
        self.right: list[str] = []
        self.wrong: list[str] = []

    def add(self, meant: str, text: str) -> None:
        (self.right if f"did you mean {meant}?" in text else self.wrong).append(text)

    def check(self, at_least: int, injected: Callable[..., None]) -> None:
        total = len(self.right) + len(self.wrong)
        injected(total, note=f"{len(self.right)} of {total} suggestions right")
        assert total >= at_least
        assert len(self.right) >= 0.95 * total, self.wrong[:5]


@pytest.mark.fault(22)
def test_every_misspelt_yaml_key_is_refused_and_95_of_100_suggestions_are_right(write, injected):
    suggestions = Suggestions()
    for key in known_keys():
        section, _, name = key.rpartition(".")
        for typo in typos(name):
            if f"{section}.{typo}".strip(".") in known_keys():
                continue
            text = message(write(f"{section}:\n  {typo}: 1\n" if section else f"{typo}: 1\n"))
            assert "recipe.yaml: unknown key" in text and typo in text
            suggestions.add(key, text)
    suggestions.check(500, injected)


@pytest.mark.fault(22)
def test_every_misspelt_flag_is_refused_and_95_of_100_suggestions_are_right(write, injected):
    recipe, suggestions = write(WHOLE), Suggestions()
    for key in known_keys():
        # Every other character: the recipe is read each time, and the test of YAML keys takes them all.
        for typo in typos(key)[::2]:
            text = message(recipe, f"--{typo}", "1")
            assert f"flag --{typo}: unknown key" in text
            suggestions.add(key, text)
    suggestions.check(400, injected)


@pytest.mark.fault(22)
def test_every_misspelt_ds_config_key_is_refused_and_95_of_100_suggestions_are_right(write, injected):
    """DeepSpeed itself takes `zero_optimzation` without a word and trains at stage 0."""
    suggestions = Suggestions()
    for key in sorted(DS_CONFIG_KEYS - DS_CONFIG_OWNED.keys()):
        for typo in typos(key):
            if typo in DS_CONFIG_KEYS:
                continue
            with pytest.raises(ConfigError, match=r"settings\.json: DeepSpeed knows no key") as caught:
                load_ds_config(str(write(json.dumps({typo: 1}), "settings.json")))
            suggestions.add(key, str(caught.value))
    suggestions.check(500, injected)


def test_the_known_ds_config_keys_are_read_by_the_installed_deepspeed():
    """Looked up in its sources, because importing it costs five seconds."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    removed = (folder / "runtime/config.py").read_text(encoding="utf-8").partition("_REMOVED_TOP_LEVEL_CONFIG_KEYS = {")
    removed_keys = set(re.findall(r'^    "(\w+)":', removed[2].partition("\n}")[0], re.MULTILINE))
    sources = (path for path in folder.rglob("*.py") if path.name.endswith(("config.py", "constants.py")))
    quoted = set(re.findall(r"""["'](\w+)["']""", "\n".join(path.read_text(encoding="utf-8") for path in sources)))
    assert not DS_CONFIG_KEYS - quoted
    assert not DS_CONFIG_KEYS & removed_keys


@pytest.mark.parametrize("key", sorted(DS_CONFIG_OWNED))
def test_a_ds_config_that_repeats_the_recipe_is_refused_and_names_the_recipes_key(write, key):
    with pytest.raises(ConfigError, match=rf"settings\.json: {key} belongs to the recipe.*{DS_CONFIG_OWNED[key][:5]}"):
        load_ds_config(str(write(json.dumps({key: 1}), "settings.json")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}', "zero_optimization appears twice"),
        ('{"zero_optimization": ', "not readable as JSON"),
        ("[]", "a JSON object"),
    ],
)
def test_a_ds_config_that_is_no_clean_json_object_is_refused(write, text, expected):
    with pytest.raises(ConfigError, match=expected):
        load_ds_config(str(write(text, "settings.json")))


def test_a_ds_config_that_does_not_exist_is_answered_with_those_that_do():
    with pytest.raises(ConfigError, match=r"no-such\.json.*zero0\.json, zero1\.json, zero2\.json"):
        load_ds_config("ds_configs/no-such.json")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("optimizer: {learning_rate: fast}", "recipe.yaml: optimizer.learning_rate: Value 'fast'"),
        ("seed: 1.5", "recipe.yaml: seed: Value '1.5'"),
        ("seed: true", "recipe.yaml: seed: Value 'True'"),
        ("seed: [1]", "recipe.yaml: seed"),
        ("student: 3", "recipe.yaml: student"),
        ("student:", "recipe.yaml: student"),
        ("student: {architecture: moe}", "recipe.yaml: student.architecture: Invalid value 'moe'"),
        ("student: {dropout: null}", "recipe.yaml: student.dropout"),
        ("optimizer: {betas: [0.9]}", "recipe.yaml: optimizer.betas"),
        ("engine: {precision: fp16}", "expected one of ['bf16', 'fp32']"),
        ("steps: 2", "recipe.yaml:5: not readable as YAML - found duplicate key steps"),
        ("student: {dropout: 0, dropout: 1}", "found duplicate key dropout"),
        ("student: [", "recipe.yaml:6: not readable as YAML"),
        ("1: 2", "unknown key 1"),
        ("seed: ${nope}", "recipe.yaml: Interpolation key 'nope' not found"),
        ("seed: !!python/object/apply:os.getpid []", "not readable as YAML - could not determine a constructor"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_file_and_key(write, line, expected):
    assert expected.replace("'bf16', 'fp32'", "'fp32', 'bf16'") in message(write(f"{WHOLE}{line}\n"))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("steps", "0"),
        ("steps", "-5"),
        ("epochs", "0"),
        ("seed", "-1"),
        ("out", " "),
        ("data.order_seed", "-1"),
        ("student.num_attention_heads", "0"),
        ("student.hidden_size", "0"),
        ("student.num_experts", "0"),
        ("student.dropout", "1"),
        ("student.router_jitter", "-0.1"),
        ("student.shared_fraction", "1.1"),
        ("loss.num_relation_heads", "0"),
        ("loss.balance", "-1"),
        ("optimizer.learning_rate", "0"),
        ("optimizer.learning_rate", ".nan"),
        ("optimizer.learning_rate", ".inf"),
        ("optimizer.warmup_fraction", "2"),
        ("optimizer.weight_decay", "-0.1"),
        ("optimizer.betas", "[0.9,1.0]"),
        ("engine.timeout_minutes", "0"),
        ("checkpoint.every_steps", "0"),
        ("checkpoint.keep_last", "0"),
        ("log.every_steps", "0"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(write, flag, value):
    assert message(write(WHOLE), f"--{flag}", value).startswith(f"{flag} (")


def test_widths_that_heads_do_not_divide_are_refused_with_both_numbers(write):
    text = message(write(WHOLE), "--student.num_attention_heads", "5")
    assert "student.hidden_size (384) is not divisible by student.num_attention_heads (5)" in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--steps"], "flag --steps has no value"),
        (["--steps", "--seed", "1"], "flag --steps has no value"),
        (["steps", "3"], "unexpected argument 'steps'"),
        (["--steps", "three"], "flag --steps: Value 'three'"),
        (["--student.init_layers", "[1"], "flag --student.init_layers: '[1' is not readable as YAML"),
        (["--student", "3"], "flag --student: "),
    ],
)
def test_a_flag_that_says_nothing_useful_is_named(write, flags, expected):
    assert expected in message(write(WHOLE), *flags)


def test_flags_take_the_value_behind_a_space_or_an_equals_sign_and_dashes_for_underscores(write):
    config = load_run_config(write(WHOLE), ["--seed=4", "--optimizer.learning-rate", "3e-4", "--seed", "5"])
    assert (config.seed, config.optimizer.learning_rate) == (5, 3e-4)
    config = load_run_config(write(WHOLE), ["--student.init_layers", "[0,1,2]", "--optimizer.betas", "[0.9,0.95]"])
    assert (config.student.init_layers, config.optimizer.betas) == ((0, 1, 2), (0.9, 0.95))
    config = load_run_config(write(WHOLE), ["--steps", "null", "--epochs", "0.5"])
    assert (config.steps, config.epochs) == (None, 0.5)


@pytest.mark.parametrize("text", ["0123", "1e5", "2024", "a: b", "[1", "ü 日本/run", "x=y", "~/r"])
def test_a_string_flag_is_taken_as_it_is_written(write, text):
    """Read as YAML, the revision 0123 is the octal number 83, and a folder called [1 is a broken list."""
    config = load_run_config(write(WHOLE), ["--teacher.revision", text, "--out", text])
    assert (config.teacher.revision, config.out) == (text, text)
    assert load_run_config(write(WHOLE), ["--teacher.revision", "null"]).teacher.revision is None


def test_what_must_be_given_is_asked_for_all_at_once(write):
    text = message(write("steps: 1\n"))
    assert "data.shards, out, teacher.model must be given" in text and "--data.shards" in text


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "only words\n"])
def test_a_recipe_that_is_no_mapping_is_refused(write, content):
    message(write(content))


def test_a_recipe_that_is_missing_or_no_text_is_named(tmp_path):
    assert "recipe not found" in message(tmp_path / "none.yaml")
    assert "recipe not found" in message(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"out: \xff\n")
    assert "binary.yaml: not readable as YAML" in message(tmp_path / "binary.yaml")


def test_a_recipe_overrides_what_it_extends_and_flags_override_both(write):
    write(WHOLE + "seed: 1\nstudent: {dropout: 0.1, num_experts: 8}\n", "base.yaml")
    middle = write("extends: base.yaml\nseed: 2\nstudent: {dropout: 0.2}\n", "middle.yaml")
    top = write("extends: middle.yaml\nlog: {every_steps: 3}\n")
    config = load_run_config(top, ["--log.every_steps", "4"])
    assert (config.seed, config.student.dropout, config.student.num_experts, config.log.every_steps) == (2, 0.2, 8, 4)
    assert load_run_config(middle, []).log.every_steps == 10


def test_a_typo_in_an_extended_recipe_names_that_recipe(write):
    write(WHOLE + "sede: 1\n", "base.yaml")
    assert "base.yaml: unknown key sede - did you mean seed?" in message(write("extends: base.yaml\n"))


def test_recipes_that_extend_each_other_are_refused(write):
    write("extends: recipe.yaml\n" + WHOLE, "other.yaml")
    assert "extends itself" in message(write("extends: other.yaml\n" + WHOLE))
    assert "extends itself" in message(write("extends: recipe.yaml\n" + WHOLE))
    assert "recipe not found: " in message(write("extends: none.yaml\n" + WHOLE))


def test_steps_and_epochs_exclude_each_other_and_the_data_must_fill_one_batch(write):
    config = load_run_config(write(WHOLE), ["--batch.global_size", "16", "--batch.micro_size", "4"])
    assert config.num_steps(16) == 1
    with pytest.raises(ConfigError, match=r"batch.global_size \(16\) is larger than the data: rows has 15 rows"):
        config.num_steps(15)
    for flags in (["--epochs", "2"], ["--steps", "null"]):
        with pytest.raises(ConfigError, match="give exactly one of steps"):
            load_run_config(write(WHOLE), flags).num_steps(5000)
    by_epochs = load_run_config(write(WHOLE), ["--steps", "null", "--epochs", "2.5"])
    assert by_epochs.num_steps(4096) == 10


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9))
def test_a_global_batch_is_cut_without_rest_or_the_message_names_sizes_that_can_be(global_size, micro_size, ranks):
    batch = BatchConfig(global_size, micro_size)
    try:
        assert batch.accumulation_steps(ranks) * micro_size * ranks == global_size
    except ConfigError as error:
        assert global_size % (micro_size * ranks)
        mend = str(error).partition("set batch.global_size to ")[2]
        sizes, _, micro = mend.partition(", or batch.micro_size to ")
        for size in sizes.split(" or "):
            assert abs(int(size) - global_size) < micro_size * ranks
            assert BatchConfig(int(size), micro_size).accumulation_steps(ranks) >= 1
        if micro:
            assert BatchConfig(global_size, int(micro)).accumulation_steps(ranks) >= 1
        else:
            assert global_size % ranks


def test_the_message_about_a_batch_that_does_not_divide_reads_well():
    with pytest.raises(ConfigError) as caught:
        BatchConfig(1000, 128).accumulation_steps(2)
    assert str(caught.value) == (
        "batch.global_size (1000) is not a multiple of batch.micro_size x ranks (128 x 2 = 256) - every rank must run "
        "whole micro-batches - set batch.global_size to 768 or 1024, or batch.micro_size to 125"
    )


def other_value(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return f"{value}x"


def leaves(tree: dict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in tree.items():
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def test_every_mistake_is_told_at_once_a_line_each(write):
    recipe = write(
        WHOLE.replace("steps: 1", "stepz: 1")
        + "optimizer: {learning_rate: -1, weight_deca: 0}\nstudent: {dropout: 2}\nlos: {balance: 0}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_run_config(recipe, ["--engine.precison", "bf16", "--log.every_steps", "often"])
    first, *lines = str(caught.value).splitlines()
    assert first == "7 problems:" and len(lines) == 7
    told = ["stepz", "optimizer.weight_deca", "los", "engine.precison", "log.every_steps", "student.dropout"]
    assert all(any(key in line for line in lines) for key in (*told, "optimizer.learning_rate")), lines


@pytest.mark.fault(19)
def test_every_key_that_differs_from_the_earlier_run_is_listed_unless_no_number_depends_on_it(injected):
    before = asdict(RunConfig())
    how_it_is_watched = (
        "out engine.timeout_minutes engine.on_collapse log.every_steps "
        "checkpoint.every_steps checkpoint.keep_last checkpoint.copy_to"
    )
    how_it_is_cut = "engine.ds_config engine.expert_parallel_size engine.activation_checkpointing batch.micro_size"
    may_change = {*how_it_is_watched.split(), *how_it_is_cut.split()}
    injected(len(leaves(before)))
    for key, value in leaves(before).items():
        after = asdict(RunConfig())
        section = after
        *path, name = key.split(".")
        for part in path:
            section = section[part]
        section[name] = other_value(value)
        expected = [] if key in may_change else [f"{key} ({value} -> {section[name]})"]
        shown = [entry.replace("[", "(").replace("]", ")") for entry in changed_keys(before, after)]
        assert shown == expected
    reseeding = replace(RunConfig(), engine=EngineConfig(on_collapse="reseed"))
    rarely = replace(reseeding, log=LogConfig(every_steps=99))
    assert changed_keys(asdict(reseeding), asdict(rarely)) == ["log.every_steps (10 -> 99)"]
    # JSON knows no tuples.
    assert changed_keys(json.loads(json.dumps(before)), before) == []


def test_every_field_has_a_line_of_doc():
    def check(schema: type) -> None:
        source = Path(sys.modules[schema.__module__].__file__ or "").read_text(encoding="utf-8")
        body = source.partition(f"class {schema.__name__}:")[2].partition("\n\n\n")[0]
        for spec in fields(schema):
            if isinstance(spec.type, type) and is_dataclass(spec.type):
                check(spec.type)
            else:
                after = body.partition(f"    {spec.name}: ")[2].partition("\n")[2]
                assert after.lstrip().startswith('"""'), f"{schema.__name__}.{spec.name}"

    check(RunConfig)


@pytest.mark.parametrize("kind", ["yaml", "flag", "ds_config"])
@pytest.mark.fault(22)
def test_a_typo_costs_less_than_two_seconds_because_torch_is_not_imported(recipe, tmp_path, kind):
    (tmp_path / "typo.json").write_text('{"zero_optimzation": {"stage": 1}}', encoding="utf-8")
    if kind == "yaml":
        recipe.write_text(recipe.read_text(encoding="utf-8").replace("steps: 6", "stpes: 6"), encoding="utf-8")
    flags = {"yaml": [], "flag": ["--stpes", "6"], "ds_config": ["--engine.ds_config", str(tmp_path / "typo.json")]}
    program = (
        "import sys; from pipeline.distill import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'deepspeed'} & sys.modules.keys(); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "--config", str(recipe), *flags[kind]]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=PROJECT, env=environment(), capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert f"did you mean {'zero_optimization' if kind == 'ds_config' else 'steps'}?" in done.stderr
    # Processor time, because other tests may be running beside this one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
