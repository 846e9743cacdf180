"""The teacher-signal cache: full k equals the teacher online, samples are unbiased, what does not fit is refused."""

import json

import numpy as np
import pytest
import torch

from data_prep.errors import CapgapError
from data_prep.files import watching_operations
from data_prep.shards import open_shards
from pipeline.batches import BatchPlan, decoder_batch
from pipeline.cached_signals import CachedSignals, bytes_per_token
from pipeline.config import BatchConfig, LossConfig, TeacherConfig, load_run_config
from pipeline.losses import active_losses, compute_losses
from pipeline.models.decoders import CachedTeacher, DecoderStudent, load_causal_teacher
from pipeline.preflight import check_run
from pipeline.teacher_cache import CacheConfig, cache, main
from tiny_decoders import RECIPE, WORDS, build_model, write_blocks, write_decoder

ROWS = 21  # two files, the second not a multiple of the batch of 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    write_decoder(root / "teacher", vocab_size=112, seed=1)
    write_decoder(root / "student", "mixtral")
    write_blocks(root / "rows", rows=ROWS)
    write_blocks(root / "other", rows=ROWS, seed=1)
    common = {"teacher": str(root / "teacher"), "shards": root / "rows", "rows_per_file": 16}
    cache(CacheConfig(**common, out=root / "topk", k=8, temperature=2.0))
    cache(CacheConfig(**common, out=root / "full", k=len(WORDS), temperature=2.0))
    cache(CacheConfig(**common, out=root / "sampled", signal="sampled", k=400))
    return root


def losses_with(folders, cached: str | None, config: LossConfig):
    """Loss and gradient of a student on five rows, from the cache or with the teacher in memory."""
    shards = open_shards(folders / "rows")
    rows = np.array([20, 0, 11, 7, 10])
    student = DecoderStudent(build_model("llama"), num_ids=len(WORDS))
    weights = active_losses(config, has_routers=False, is_decoder=True)
    if cached is None:
        batch = decoder_batch(shards.read(rows))
        teacher = load_causal_teacher(folders / "teacher", TeacherConfig(model="x"), dtype=torch.float32)
        said = teacher(batch)
    else:
        signals = CachedSignals(folders / cached)
        plan = BatchPlan(shards, BatchConfig(5, 5), 0, 0, 1, signals)
        data = plan.step_data(0)
        # The plan's own rows are shuffled: what it attached must be what the cache holds about them.
        packed = {name: part.numpy() for name, part in data.micro_batches[0].cached_signals.items()}
        assert (packed["rest"].view(np.uint16) == signals.read(data.rows[0])["rest"]).all()
        batch = decoder_batch(shards.read(rows))
        columns = {name: torch.from_numpy(c.view(f"int{8 * c.itemsize}")) for name, c in signals.read(rows).items()}
        batch = type(batch)(**{**batch.__dict__, "cached_signals": columns})
        said = CachedTeacher(signals.manifest)(batch)
    losses = compute_losses(weights, student(batch), said, config)
    losses.total.backward()
    return losses, {name: parameter.grad for name, parameter in student.named_parameters()}


@pytest.mark.parametrize("name", ["logit_kl", "reverse_kl", "jsd"])
def test_a_cache_of_all_ids_equals_the_teacher_online(folders, name):
    config = LossConfig(**{name: 1.0}, cross_entropy=0.5, temperature=2.0)
    online, gradients = losses_with(folders, None, config)
    cached, ours = losses_with(folders, "full", config)
    assert float(cached.parts[name]) == pytest.approx(float(online.parts[name]), rel=1e-3)
    for key, gradient in gradients.items():
        assert float((ours[key] - gradient).norm()) < 2e-3 * float(gradient.norm()), key


def test_the_best_k_give_a_lower_bound(folders):
    config = LossConfig(logit_kl=1.0, temperature=2.0)
    online, cached = (losses_with(folders, name, config)[0].parts["logit_kl"] for name in (None, "topk"))
    assert 0 < float(cached) < float(online)


def test_samples_estimate_the_loss_and_its_gradient_within_their_monte_carlo_error(folders):
    config = LossConfig(logit_kl=1.0)
    online, gradients = losses_with(folders, None, config)
    sampled, ours = losses_with(folders, "sampled", config)
    assert float(sampled.parts["logit_kl"]) == pytest.approx(float(online.parts["logit_kl"]), rel=0.05)
    ours, expected = (torch.cat([part.flatten() for part in parts.values()]) for parts in (ours, gradients))
    assert float((ours - expected).norm()) < 0.25 * float(expected.norm())
    assert float(torch.cosine_similarity(ours, expected, dim=0)) > 0.97


def test_the_frequencies_of_the_samples_are_the_teachers_probabilities(folders):
    """Over all tokens: each id's count against its expectation, in standard deviations."""
    shards, signals = open_shards(folders / "rows"), CachedSignals(folders / "sampled")
    rows = np.arange(ROWS)
    teacher = load_causal_teacher(folders / "teacher", TeacherConfig(model="x"), dtype=torch.float32)
    said = teacher(decoder_batch(shards.read(rows))).next_token
    p_NV = (said.hidden_ND @ said.head_VD[: len(WORDS)].T).softmax(-1)
    counts = np.bincount(signals.read(rows)["ids"].ravel(), minlength=len(WORDS))
    expected, spread = 400 * p_NV.sum(0), (400 * (p_NV * (1 - p_NV)).sum(0)).sqrt()
    deviations = (torch.from_numpy(counts) - expected) / spread
    assert float(deviations.square().mean()) < 2 and float(deviations.abs().max()) < 5


def test_the_manifest_tells_the_bytes_of_a_token(folders):
    for name, k in (("topk", 8), ("sampled", 400)):
        manifest = CachedSignals(folders / name).manifest
        exact = bytes_per_token(manifest.signal, k, len(WORDS))
        assert exact == {"topk": 4 * k + 2, "sampled": 2 * k + 2}[name]
        assert exact <= manifest.bytes_per_token < exact + 10  # headers weigh on a file of a few hundred tokens
    assert 0 < CachedSignals(folders / "topk").manifest.measured["tail_mass"] < 1


class Killed(BaseException):
    pass


@pytest.mark.fault(4)
def test_a_killed_cache_goes_on_with_the_next_file_and_ends_with_the_same_bytes(folders, tmp_path):
    config = CacheConfig(
        str(folders / "teacher"), folders / "rows", tmp_path / "out", k=8, temperature=2.0, rows_per_file=16
    )

    def kill_at_the_second_file(operation, path):
        if operation == "rename" and path.name == "signals-00001-of-00002.arrow":
            raise Killed

    with pytest.raises(Killed), watching_operations(kill_at_the_second_file):
        cache(config)
    first = (config.out / "signals-00000-of-00002.arrow").stat().st_mtime_ns
    cache(config)
    assert (config.out / "signals-00000-of-00002.arrow").stat().st_mtime_ns == first
    for path in (folders / "topk").glob("signals-*"):
        assert (config.out / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(CapgapError, match="begun with another k"):
        cache(
            CacheConfig(
                str(folders / "teacher"), folders / "rows", tmp_path / "out", k=9, temperature=2.0, rows_per_file=16
            )
        )


def test_what_is_stored_about_a_row_does_not_depend_on_where_files_end(folders, tmp_path):
    config = CacheConfig(
        str(folders / "teacher"), folders / "rows", tmp_path / "out", signal="sampled", k=400, rows_per_file=1
    )
    cache(config)
    signals, rows = CachedSignals(config.out), np.arange(ROWS)
    assert [entry["rows"] for entry in signals.manifest.files] == [8, 8, 5]  # whole batches
    for name, column in CachedSignals(folders / "sampled").read(rows).items():
        assert (signals.read(rows)[name] == column).all()


def test_two_tasks_of_an_array_make_what_one_makes(folders, tmp_path, capsys, monkeypatch):
    common = {"teacher": str(folders / "teacher"), "shards": folders / "rows", "out": tmp_path / "out"}
    common |= {"rows_per_file": 16, "k": 8, "temperature": 2.0, "num_tasks": 2}
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(CapgapError, match=r"SLURM_ARRAY_TASK_ID is \(not set\) - give --task-index 0 to 1"):
        cache(CacheConfig(**common))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    cache(CacheConfig(**common))
    assert "1 of 2 files are left to other tasks" in capsys.readouterr().out
    cache(CacheConfig(**common, task_index=0))
    assert "left to other tasks" not in capsys.readouterr().out
    assert CachedSignals(tmp_path / "out").manifest == CachedSignals(folders / "topk").manifest


def test_a_dry_run_reports_storage_and_bias_and_writes_nothing(folders, tmp_path, capsys):
    flags = ["--teacher", str(folders / "teacher"), "--shards", str(folders / "rows"), "--out", str(tmp_path / "out")]
    assert main([*flags, "--k", "16", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "k=16: 66 bytes per token" in printed and "tail mass" in printed
    assert not list((tmp_path / "out").glob("signals-*"))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--teacher.cache", "{}/full", "--data.shards", "{}/other"], ["other shards", "make it again"]),
        (["--teacher.cache", "{}/full", "--loss.temperature", "1"], ["temperature 2.0", "loss.temperature is 1.0"]),
        (["--teacher.cache", "{}/sampled", "--loss.logit_kl", "0", "--loss.jsd", "1"], ["sampled", "loss.jsd"]),
        (["--teacher.cache", "{}/full", "--loss.temperature", "2", "--teacher.model", "{}/student"], ["other weights"]),
        (["--teacher.cache", "{}/rows"], ["fingerprint", "unexpected content"]),
        (["--teacher.cache", "{}/nothing"], ["no manifest.json"]),
    ],
    ids=["other shards", "other temperature", "sampled", "other teacher", "no cache", "missing"],
)
def test_a_cache_that_does_not_fit_the_run_is_refused(folders, tmp_path, flags, parts):
    recipe = tmp_path / "recipe.yaml"
    names = {name: folders / name for name in ("teacher", "student")}
    recipe.write_text(RECIPE.format(out=tmp_path / "run", shards=folders / "rows", **names))
    with pytest.raises(CapgapError) as caught:
        check_run(load_run_config(recipe, [flag.format(folders) for flag in flags]), 1)
    assert any(part in str(caught.value) for part in parts), caught.value


@pytest.mark.fault(7)
def test_a_damaged_file_is_named(folders, tmp_path):
    import shutil

    shutil.copytree(folders / "topk", tmp_path / "copy")
    path = tmp_path / "copy" / "signals-00001-of-00002.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    signals = CachedSignals(tmp_path / "copy")
    signals.read(np.arange(3))
    with pytest.raises(CapgapError, match="signals-00001-of-00002"):
        signals.read(np.array([20]))
    manifest = json.loads((tmp_path / "copy" / "manifest.json").read_text())
    manifest["k"] = 7
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CapgapError, match="damaged"):
        CachedSignals(tmp_path / "copy")
