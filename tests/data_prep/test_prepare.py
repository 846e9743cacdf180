import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dumps import dump_of, multistream

from data_prep.errors import ConfigError, DataError
from data_prep.files import file_hash
from data_prep.inspect_shards import main as inspect_main
from data_prep.prepare import PrepareConfig, main, prepare
from data_prep.shards import open_shards


def config(source, out, tokenizer, **options) -> PrepareConfig:
    sources = source if isinstance(source, tuple) else (str(source),)
    options = {"length": 64, "part_megabytes": 0.02, "min_characters": 10, **options}
    return PrepareConfig(source=sources, out=out, tokenizer=str(tokenizer), **options)


def contents(folder: Path) -> dict[str, str]:
    """name -> hash of every file but locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): file_hash(path) for path in files}


def test_the_sample_dump_is_accounted_for_page_by_page(prepared):
    stats = json.loads((prepared / "stats.json").read_text())
    assert stats["documents_in"] == 206
    assert stats["rejected"] == {"disambiguation": 8, "other namespace": 1, "redirect": 99}
    assert stats["documents_out"] == 98
    manifest = open_shards(prepared).manifest
    assert manifest.documents["documents_out"] == 98
    assert sum(manifest.shards[i].rows for i in range(len(manifest.shards))) == manifest.num_rows


def test_rows_are_sentences_of_the_articles(prepared):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer" / "tokenizer.json"))
    row = open_shards(prepared).read(np.array([0]))
    text = tokenizer.decode(row["input_ids"][0].tolist())
    assert text.startswith("anarchism is a political philosophy that")


def test_the_bytes_are_the_same_for_1_2_and_7_workers(small_dump, tokenizer_folder, tmp_path):
    made = []
    for workers in (1, 2, 7):
        out = tmp_path / f"w{workers}"
        prepare(config(small_dump, out, tokenizer_folder, workers=workers, part_megabytes=0.1))
        made.append(contents(out))
    assert len([name for name in made[0] if name.endswith(".arrow")]) >= 7
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("num_tasks", [2, 3])
def test_array_tasks_and_finish_make_the_bytes_of_one_run(jsonl, tokenizer_folder, tmp_path, num_tasks, monkeypatch):
    prepare(config(jsonl, tmp_path / "one", tokenizer_folder, part_megabytes=0.002))
    array = tmp_path / "array"
    for task in reversed(range(num_tasks)):
        options = {"part_megabytes": 0.002, "num_tasks": num_tasks}
        if task:
            options["task_index"] = task
        else:
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")
            with pytest.raises(DataError, match=r"parts \(0, .* not made yet - run the tasks that are missing"):
                prepare(config(jsonl, array, tokenizer_folder, part_megabytes=0.002, finish=True))
        prepare(config(jsonl, array, tokenizer_folder, **options))
        assert not (array / "manifest.json").exists()
    prepare(config(jsonl, array, tokenizer_folder, part_megabytes=0.002, finish=True))
    assert contents(array) == contents(tmp_path / "one")


def test_array_tasks_may_start_together(jsonl, tokenizer_folder, tmp_path):
    out = tmp_path / "array"
    command = [sys.executable, "-m", "data_prep.prepare", "--source", str(jsonl), "--out", str(out), "--length", "64"]
    command += ["--tokenizer", str(tokenizer_folder), "--part-megabytes", "0.002", "--min-characters", "10"]
    root = Path(__file__).parents[2]
    tasks = [subprocess.Popen([*command, "--num-tasks", "4", "--task-index", str(i)], cwd=root) for i in range(4)]
    assert [task.wait() for task in tasks] == [0, 0, 0, 0]
    prepare(config(jsonl, out, tokenizer_folder, part_megabytes=0.002, finish=True))
    prepare(config(jsonl, tmp_path / "one", tokenizer_folder, part_megabytes=0.002))
    assert contents(out) == contents(tmp_path / "one")


def test_a_rerun_makes_only_what_is_missing(jsonl, tokenizer_folder, tmp_path, capsys):
    options = {"part_megabytes": 0.002}
    out = tmp_path / "out"
    prepare(config(jsonl, out, tokenizer_folder, num_tasks=2, task_index=1, **options))
    prepare(config(jsonl, out, tokenizer_folder, **options))
    assert "parts were complete already" in capsys.readouterr().out
    before = contents(out)
    prepare(config(jsonl, out, tokenizer_folder, **options))
    assert "is complete already: nothing to do" in capsys.readouterr().out
    assert contents(out) == before


@pytest.mark.fault(19)
def test_a_folder_of_another_config_is_refused_by_the_keys_that_differ(
    jsonl, tokenizer_folder, prepared, tmp_path, injected
):
    injected(4)
    out = tmp_path / "out"
    prepare(config(jsonl, out, tokenizer_folder))
    with pytest.raises(ConfigError, match=r"another config: length \(64, now 32\), seed \(0, now 1\) - "):
        prepare(config(jsonl, out, tokenizer_folder, length=32, seed=1))
    with pytest.raises(ConfigError, match=r"another config: source \(documents.jsonl:\w+, now other.jsonl:\w+\)"):
        other = tmp_path / "other.jsonl"
        other.write_text(jsonl.read_text() + '{"text": "more"}\n')
        prepare(config(other, out, tokenizer_folder))
    (tmp_path / "swapped").mkdir()
    words = (tokenizer_folder / "vocab.txt").read_text().split("\n")
    (tmp_path / "swapped" / "vocab.txt").write_text("\n".join([*words[:300], *words[301:200:-1], *words[301:]]))
    with pytest.raises(ConfigError, match=r"another config: tokenizer \(\w+, now \w+\)"):
        prepare(config(jsonl, out, tmp_path / "swapped"))


def test_another_engine_or_number_of_workers_is_not_another_config(jsonl, tokenizer_folder, tmp_path, capsys):
    out = tmp_path / "out"
    prepare(config(jsonl, out, tokenizer_folder, tokenizer_engine="huggingface"))
    prepare(config(jsonl, out, tokenizer_folder, tokenizer_engine="memo", workers=2))
    assert "nothing to do" in capsys.readouterr().out


def test_the_memo_engine_gives_the_bytes_of_the_reference(small_dump, tokenizer_folder, tmp_path):
    for engine in ("memo", "huggingface"):
        prepare(config(small_dump, tmp_path / engine, tokenizer_folder, part_megabytes=8, tokenizer_engine=engine))
    assert contents(tmp_path / "memo") == contents(tmp_path / "huggingface")


def test_rejected_documents_are_counted_by_reason_per_source(tmp_path, tokenizer_folder):
    good = "A sentence that is long enough to stay. " * 5
    lines = [{"text": good}, {"text": ""}, {"text": "short"}, {"text": "x" * 3000}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": good.replace("\n", "\x00") + "\x01"}))
    out = tmp_path / "out"
    sources = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    prepare(config(sources, out, tokenizer_folder, max_page_megabytes=0.002))
    stats = json.loads((out / "stats.json").read_text())
    assert stats["sources"][0]["rejected"] == {"empty": 1, "too large": 1, "too short": 1}
    assert stats["sources"][1]["rejected"] == {}
    assert stats["replaced_characters"] == 1
    assert stats["documents_in"] == 5 == stats["documents_out"] + sum(stats["rejected"].values())


@pytest.mark.fault(24)
def test_no_row_at_all_is_an_error_that_says_where_they_went(tmp_path, tokenizer_folder):
    (tmp_path / "a.jsonl").write_text('{"text": "tiny"}\n' * 3)
    with pytest.raises(DataError, match=r"no rows - 3 documents in = 0 out \+ 3 rejected \(3 too short\)"):
        prepare(config(tmp_path / "a.jsonl", tmp_path / "out", tokenizer_folder))


@pytest.mark.fault(10)
def test_a_cut_dump_is_an_error_and_a_partial_source_by_option(sample, tokenizer_folder, tmp_path):
    cut = tmp_path / "cut.xml.bz2"
    cut.write_bytes(sample.read_bytes()[:1_000_000])
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"byte 1000000, .*last complete page id \(665\).*--allow-partial"):
        prepare(config(cut, out, tokenizer_folder, part_megabytes=1))
    assert not (out / "manifest.json").exists()
    prepare(config(cut, out, tokenizer_folder, part_megabytes=1, allow_partial=True))
    source = open_shards(out).manifest.sources[0]
    assert "byte 1000000" in source["partial"][0]
    assert source["documents_in"] == 142


def test_blended_sources_keep_their_weights_and_say_the_realised_mix(tmp_path, tokenizer_folder):
    for name, size in (("a", 300), ("b", 300)):
        text = f"Source {name} has a sentence of some words here. " * 3
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": text}) + "\n") * size)
    out = tmp_path / "out"
    sources = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    prepare(config(sources, out, tokenizer_folder, weights=(3.0, 1.0)))
    mix = [source["share_of_tokens"] for source in open_shards(out).manifest.sources]
    assert mix == pytest.approx([0.75, 0.25], abs=0.01)


def test_lm_blocks_are_documents_closed_by_eos_back_to_back(jsonl, tokenizer_folder, tmp_path):
    from tokenizers import Tokenizer

    out = tmp_path / "out"
    prepare(config(jsonl, out, tokenizer_folder, rows="lm-blocks", length=50, part_megabytes=1))
    shards = open_shards(out)
    rows = shards.read(np.arange(shards.num_rows))
    assert (rows["length"][:-1] == 50).all() and shards.manifest.utilisation > 0.98
    tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    stream = rows["input_ids"].reshape(-1)[: shards.manifest.num_tokens].tolist()
    texts = tokenizer.decode(stream, skip_special_tokens=False).split("[SEP]")
    assert len(texts) == 41 and texts[7].strip().startswith("document 7 says")
    ends = rows["input_ids"][0] == shards.manifest.tokenizer["eos_id"]
    assert rows["document_index"][0].tolist() == [int(ends[:column].sum()) for column in range(50)]


def test_text_rows_keep_the_cleaned_articles(sample, tmp_path):
    import datasets

    out = tmp_path / "out"
    prepare(PrepareConfig(source=(str(sample),), out=out, rows="text"))
    loaded = datasets.load_from_disk(str(out))
    assert loaded[0]["title"] == "Anarchism" and loaded[0]["id"] == "12"
    assert loaded[0]["text"].startswith("Anarchism is a political philosophy")
    # what was prepared as text is a source like any other
    again = tmp_path / "again"
    prepare(PrepareConfig(source=(str(out),), out=again, rows="text"))
    assert datasets.load_from_disk(str(again))["text"] == loaded["text"]


def test_the_oracle_can_be_the_cleaner(tmp_path, tokenizer_folder):
    header, pages, footer = dump_of(50)
    pages = [page for page in pages if 3_000 < len(page) < 15_000]
    (tmp_path / "a.xml").write_text(header + "".join(pages) + footer, encoding="utf-8")
    counts = []
    for cleaner in ("single-pass", "mwparserfromhell"):
        prepare(config(tmp_path / "a.xml", tmp_path / cleaner, tokenizer_folder, cleaner=cleaner))
        counts.append(open_shards(tmp_path / cleaner).manifest.num_tokens)
    assert counts[0] == pytest.approx(counts[1], rel=0.03)


def test_duplicate_paragraphs_go_by_option(tmp_path, tokenizer_folder):
    same = "This paragraph stands in every document of the source and is long enough."
    lines = [json.dumps({"text": f"{same}\nA line of its own, number {n}, that differs."}) for n in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare(config(tmp_path / "a.jsonl", tmp_path / "out", tokenizer_folder, drop_duplicate_paragraphs=True))
    assert json.loads((tmp_path / "out" / "stats.json").read_text())["duplicate_paragraphs"] == 4


@pytest.mark.fault(28)
def test_unusual_paths_work(jsonl, tokenizer_folder, tmp_path, monkeypatch):
    folder = tmp_path / "ü 日本" / ("long" * 40)
    folder.mkdir(parents=True)
    (folder / "quelle ñ.jsonl").write_bytes(jsonl.read_bytes())
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    prepare(config("./quelle ñ.jsonl", Path("aus gabe"), tokenizer_folder))
    prepare(config(tmp_path / "link" / "quelle ñ.jsonl", tmp_path / "link" / "two", tokenizer_folder))
    first, second = contents(folder / "aus gabe"), contents(folder / "two")
    assert {k: v for k, v in first.items() if k.endswith(".arrow")} == {
        k: v for k, v in second.items() if k.endswith(".arrow")
    }


def test_a_file_in_the_way_of_the_output_is_a_one_line_error(jsonl, tokenizer_folder, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="a file of that name is in the way"):
        prepare(config(jsonl, tmp_path / "out", tokenizer_folder))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--source", "none.xml.bz2"], 3, "none.xml.bz2: no such file"),
        (["--source", "SAMPLE", "--tokenizer", "/no/such"], 3, "loading tokenizer /no/such - no such folder"),
        (["--source", "SAMPLE", "--length", "4"], 2, "--length (4)"),
        (["--source", "SAMPLE", "--weights", "1", "2"], 2, "--weights"),
        (["--source", "SAMPLE", "--num-tasks", "4"], 2, "SLURM_ARRAY_TASK_ID is (not set)"),
        (["--source", "SAMPLE", "--num-tasks", "4", "--task-index", "4"], 2, "--task-index (4)"),
    ],
)
def test_a_users_mistake_is_one_line_and_an_exit_code(
    arguments, code, words, sample, tokenizer_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    arguments = [str(sample) if a == "SAMPLE" else a for a in arguments]
    if "--tokenizer" not in arguments:
        arguments += ["--tokenizer", str(tokenizer_folder)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == code
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and words in error[0] and error[0].count(" - ") >= 2


@pytest.mark.fault(22)
def test_a_misspelt_flag_is_refused_with_a_suggestion(sample, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--source", str(sample), "--tokeniser", "x", "--out", str(tmp_path)])
    assert exit_info.value.code == 2
    assert "--tokenizer" in capsys.readouterr().err


def test_data_verify_and_show_tell_what_is_in_a_folder(prepared, tmp_path, capsys):
    assert inspect_main(["verify", str(prepared)]) == 0
    assert "every hash agrees" in capsys.readouterr().out
    assert inspect_main(["show", str(prepared)]) == 0
    shown = capsys.readouterr().out
    assert "206 in = 98 out + 108 rejected" in shown and "[CLS] anarchism is a political philosophy" in shown
    assert inspect_main(["verify", str(tmp_path / "none")]) == 3


@pytest.mark.fault(7)
def test_data_verify_names_every_damaged_shard(jsonl, tokenizer_folder, tmp_path, capsys, injected):
    out = tmp_path / "out"
    prepare(config(jsonl, out, tokenizer_folder, part_megabytes=0.002))
    files = sorted(out.glob("data-*.arrow"))
    injected(2)
    for file in (files[0], files[2]):
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)
    assert inspect_main(["verify", str(out)]) == 3
    error = capsys.readouterr().err
    assert files[0].name in error and files[2].name in error and files[1].name not in error


def test_a_parallel_multistream_read_equals_the_serial_one_byte_for_byte(small_dump, tokenizer_folder, tmp_path):
    dump = multistream(tmp_path)
    made = {}
    for name, workers in (("serial", 1), ("parallel", 3)):
        prepare(config(dump, tmp_path / name, tokenizer_folder, workers=workers, part_megabytes=0.2))
        made[name] = contents(tmp_path / name)
    os.remove(tmp_path / "enwiki-multistream-index.txt.bz2")
    prepare(config(dump, tmp_path / "scanned", tokenizer_folder, part_megabytes=0.2))
    made["scanned"] = contents(tmp_path / "scanned")
    assert made["serial"] == made["parallel"] == made["scanned"]
    assert len([name for name in made["serial"] if name.endswith(".arrow")]) >= 5
    # and the rows are those of the single-stream file
    prepare(config(small_dump, tmp_path / "single", tokenizer_folder, part_megabytes=8))
    single, many = open_shards(tmp_path / "single"), open_shards(tmp_path / "serial")
    everything = np.arange(single.num_rows)
    assert np.array_equal(single.read(everything)["input_ids"], many.read(everything)["input_ids"])
