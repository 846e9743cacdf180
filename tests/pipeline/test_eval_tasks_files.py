"""Reading of task files: the bundled samples, GLUE's layouts, and every way in which a file can be wrong."""

import os
from pathlib import Path

import pytest

from data_prep.errors import DataError
from pipeline.eval_tasks import GROUPS, TASKS, glue, ner
from pipeline.eval_tasks.task_files import Malformed, fixed_part, read_lines

SAMPLES = Path(__file__).parents[2] / "data_prep" / "samples"


def strict() -> Malformed:
    return Malformed(allowed=0)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def test_the_bundled_qnli_reads_in_full():
    train, dev = glue.QNLI.files(SAMPLES)
    rows = glue.read_rows(train, glue.QNLI, strict())
    assert len(rows) == 1000
    assert len(glue.read_rows(dev, glue.QNLI, strict())) == 500
    assert rows[0].texts[0].endswith("?")
    assert {row.label for row in rows} == {0, 1}


def test_the_bundled_wikigold_reads_in_full_and_splits_by_document():
    (path,) = ner.WIKIGOLD.files(SAMPLES)
    documents = ner.read_documents(path, strict())
    assert len(documents) == 145
    assert sum(len(document) for document in documents) == 1696
    assert sum(len(sentence.words) for document in documents for sentence in document) == 39007
    parts = ner.split_by_document(documents)
    assert sum(map(len, parts.values())) == 1696
    assert parts["test"][: len(documents[4])] == documents[4]
    assert parts["dev"][: len(documents[3])] == documents[3]


def test_label_names_and_numbers_mean_the_same(tmp_path):
    path = write(
        tmp_path / "train.tsv",
        "index\tquestion\tsentence\tlabel\n7\tWho?\tHe.\tnot_entailment\n8\tWho?\tShe.\tentailment\n9\tWho?\tWe.\t1\n",
    )
    assert [row.label for row in glue.read_rows(path, glue.QNLI, strict())] == [1, 0, 1]


def test_cola_has_no_header(tmp_path):
    path = write(
        tmp_path / "train.tsv", "gj04\t1\t\tOur friends won't buy this.\ngj04\t0\t*\tThey drank the pub dry of.\n"
    )
    rows = glue.read_rows(path, glue.COLA, strict())
    assert [(row.texts[0][:4], row.label) for row in rows] == [("Our ", 1), ("They", 0)]


def test_mnli_reads_its_wide_files_by_column_name(tmp_path):
    head = "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n"
    path = write(tmp_path / "train.tsv", head + "0\t1\t1n\tfiction\tHe ran.\tHe moved.\tneutral\tentailment\n")
    assert glue.read_rows(path, glue.MNLI, strict())[0] == glue.Row(texts=("He ran.", "He moved."), label=1)


def test_a_byte_order_mark_and_quotes_are_no_part_of_the_columns(tmp_path):
    path = write(
        tmp_path / "train.tsv",
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t5\t6\t"He said so.\tHe said "so".\r\n',
    )
    assert glue.read_rows(path, glue.MRPC, strict()) == [glue.Row(texts=('"He said so.', 'He said "so".'), label=1)]


def test_stsb_labels_are_real_numbers(tmp_path):
    path = write(tmp_path / "train.tsv", "sentence1\tsentence2\tscore\na\tb\t3.800\n")
    assert glue.read_rows(path, glue.STSB, strict())[0].label == pytest.approx(3.8)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("question\tsentence\tlabel\nWho?\tHe.\t0\nWho?\tShe.\n", "train.tsv:3 - 2 columns instead of 3"),
        ("question\tsentence\tlabel\nWho?\tHe.\tmaybe\n", "train.tsv:2 - label 'maybe' is not entailment or"),
        ("question\ttext\tlabel\nWho?\tHe.\t0\n", "train.tsv:1 - the header has no column 'sentence'"),
        ("question\tsentence\tlabel\n", "train.tsv - it holds no labelled rows"),
        ("", "train.tsv - it holds no labelled rows"),
    ],
)
def test_a_malformed_glue_file_is_named_with_its_line(tmp_path, text, complaint):
    path = write(tmp_path / "train.tsv", text)
    with pytest.raises(DataError) as caught:
        glue.read_rows(path, glue.QNLI, strict())
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_malformed_rows_are_skipped_and_counted_when_that_was_asked_for(tmp_path):
    path = write(tmp_path / "train.tsv", "question\tsentence\tlabel\nWho?\tHe.\t0\nbroken\nWho?\tShe.\t1\n")
    malformed = Malformed(allowed=1)
    assert len(glue.read_rows(path, glue.QNLI, malformed)) == 2
    assert malformed.count == 1


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(b"question\tsentence\tlabel\nWh\xe9?\tHe.\t0\n")
    with pytest.raises(DataError, match=r"train\.tsv:2 - not UTF-8 at byte 2 of the line"):
        list(read_lines(path))


def test_only_a_line_feed_ends_a_line(tmp_path):
    path = write(tmp_path / "train.tsv", "one\u2028still one\x85and still\ntwo\n")
    assert [number for number, line in read_lines(path) if line] == [1, 2]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("The O\nMad I-ORG\nCapsule\n", "x.conll:3 - one column instead of a token and its tag"),
        ("The O\nMad ORG\n", "x.conll:2 - tag 'ORG' is neither O nor like B-PER"),
        ("-DOCSTART- O\n\n", "x.conll - it holds no sentences"),
    ],
)
def test_a_malformed_conll_file_is_named_with_its_line(tmp_path, text, complaint):
    path = write(tmp_path / "x.conll", text)
    with pytest.raises(DataError) as caught:
        ner.read_documents(path, strict())
    assert complaint in str(caught.value)


def test_conll_takes_the_first_and_last_of_four_columns(tmp_path):
    path = write(
        tmp_path / "eng.train", "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\nrejects VBZ I-VP O\n\nPeter NNP I-NP I-PER\n"
    )
    assert ner.read_documents(path, strict()) == [
        [ner.Sentence(("EU", "rejects"), ("I-ORG", "O")), ner.Sentence(("Peter",), ("I-PER",))]
    ]


def test_a_missing_folder_says_where_the_data_can_be_had(tmp_path):
    with pytest.raises(DataError, match=r"MNLI - no such folder - get GLUE from https://gluebenchmark.com/tasks"):
        TASKS["mnli"].files(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path / "QNLI" / "train.tsv", "x")
    with pytest.raises(DataError, match=r"QNLI/dev\.tsv - file is missing"):
        TASKS["qnli"].files(tmp_path)


def test_a_missing_data_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"the --data folder .*nowhere does not exist"):
        TASKS["wikigold"].files(tmp_path / "nowhere")


def test_the_layouts_of_glue_and_of_unpacked_collections_are_found(tmp_path):
    for folder in ("glue_data/RTE", "ner_open/wnut17"):
        for name in ("train.tsv", "dev.tsv", "train.conll", "dev.conll", "test.conll"):
            write(tmp_path / folder / name, "x")
    write(tmp_path / "ner_open" / "wikigold.conll.txt", "x")
    assert [path.name for path in TASKS["rte"].files(tmp_path)] == ["train.tsv", "dev.tsv"]
    assert [path.name for path in TASKS["wnut17"].files(tmp_path)] == ["train.conll", "dev.conll", "test.conll"]
    assert TASKS["wikigold"].files(tmp_path) == [tmp_path / "ner_open" / "wikigold.conll.txt"]


def test_the_part_taken_is_the_same_every_time_and_has_no_repeats():
    part = fixed_part(1000, 100)
    assert part == fixed_part(1000, 100)
    assert len(set(part)) == 100
    assert fixed_part(5, 100) == [0, 1, 2, 3, 4]


def test_the_glue_score_averages_the_eight_numbers_of_the_papers():
    headlines = [headline.label for name in GROUPS["glue"] for headline in TASKS[name].headlines]
    assert headlines == [
        "SST-2 acc",
        "MRPC F1",
        "STS-B Spearman",
        "QQP F1",
        "MNLI-m acc",
        "MNLI-mm acc",
        "QNLI acc",
        "RTE acc",
    ]


# Row counts that the data's publishers state. These sets may not be bundled.
OFFICIAL = {
    "sst2": (67349, 872),
    "mrpc": (3668, 408),
    "stsb": (5749, 1500),
    "wnli": (635, 71),
    "wnut17": (3394, 1009, 1287),
}


@pytest.mark.skipif("CAPGAP_DATA" not in os.environ, reason="CAPGAP_DATA names no folder of unpacked task data")
@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_files_read_in_full(name):
    data = Path(os.environ["CAPGAP_DATA"])
    task = TASKS[name]
    try:
        paths = task.files(data)
    except DataError as error:
        pytest.skip(str(error))
    if isinstance(task, glue.SentenceTask):
        counts = [len(glue.read_rows(path, task, strict())) for path in paths]
    else:
        counts = [sum(map(len, ner.read_documents(path, strict()))) for path in paths]
    assert tuple(counts) == OFFICIAL[name]
