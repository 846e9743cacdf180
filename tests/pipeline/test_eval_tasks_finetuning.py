"""The parts of fine-tuning: batches, alignment of tags, metrics, intervals, figures."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import pre_tokenizers
from transformers import BertConfig, BertModel, BertTokenizerFast, RobertaTokenizerFast

from data_prep.errors import ConfigError
from pipeline.eval_tasks import ner
from pipeline.eval_tasks.finetuning import EncodedSplit, collate, length_grouped_batches, loss_of
from pipeline.eval_tasks.glue import classification_metrics, regression_metrics
from pipeline.eval_tasks.intervals import student_interval
from pipeline.eval_tasks.loading import encoder_figures
from pipeline.eval_tasks.settings import EvalSettings
from pipeline.eval_tasks.throughput import measure_throughput

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "mad", "cap", "##sule", "##s", "from", "japan"]


@pytest.fixture
def tokenizer() -> BertTokenizerFast:
    return BertTokenizerFast(vocab={piece: i for i, piece in enumerate(PIECES)})


def test_every_row_stands_in_exactly_one_batch_of_an_epoch():
    lengths = np.random.default_rng(0).integers(5, 128, size=1009)
    batches = length_grouped_batches(lengths, batch_size=32, seed=1, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(1009))
    assert max(map(len, batches)) == 32


def test_batches_depend_on_seed_and_epoch_and_on_nothing_else():
    lengths = np.arange(100)
    first, again = (length_grouped_batches(lengths, batch_size=8, seed=1, epoch=0) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    for other in ({"seed": 2, "epoch": 0}, {"seed": 1, "epoch": 1}):
        changed = length_grouped_batches(lengths, batch_size=8, **other)
        assert any(a.shape != b.shape or (a != b).any() for a, b in zip(first, changed, strict=True))


def test_grouping_by_length_saves_most_padding():
    lengths = np.random.default_rng(0).integers(10, 128, size=4096)
    batches = length_grouped_batches(lengths, batch_size=32, seed=0, epoch=0)
    padded = sum(lengths[rows].max() * len(rows) for rows in batches)
    assert padded / lengths.sum() < 1.1


def test_padding_is_masked_and_never_a_label():
    split = EncodedSplit(
        input_ids=[np.array([2, 4, 3]), np.array([2, 4, 5, 6, 3])],
        token_type_ids=None,
        labels=[np.array([-100, 1, -100]), np.array([-100, 0, 1, -100, -100])],
    )
    inputs, labels = collate(split, np.array([0, 1]), pad_id=0, device=torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[2, 4, 3, 0, 0], [2, 4, 5, 6, 3]]
    assert inputs["attention_mask"].sum(1).tolist() == [3, 5]
    assert labels.tolist()[0] == [-100, 1, -100, -100, -100]


def test_the_loss_leaves_unlabelled_tokens_out():
    logits = torch.randn(2, 4, 3)
    labels = torch.tensor([[-100, 2, -100, 0], [1, -100, -100, -100]])
    by_hand = [-logits[0, 1].log_softmax(-1)[2], -logits[0, 3].log_softmax(-1)[0], -logits[1, 0].log_softmax(-1)[1]]
    assert loss_of(logits, labels).item() == pytest.approx(sum(x.item() for x in by_hand) / 3, rel=1e-5)


def test_real_valued_labels_are_trained_with_squared_error():
    assert loss_of(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 4.0])).item() == pytest.approx(2.0)


def test_a_tag_stands_on_the_first_piece_of_its_word(tokenizer):
    sentence = ner.Sentence(("the", "mad", "capsules", "from", "japan"), ("O", "I-ORG", "I-ORG", "O", "I-LOC"))
    split, first_pieces = ner.encode_words([sentence], tokenizer, ["I-LOC", "I-ORG", "O"], max_length=32)
    pieces = tokenizer.convert_ids_to_tokens(split.input_ids[0])
    assert pieces == ["[CLS]", "the", "mad", "cap", "##sule", "##s", "from", "japan", "[SEP]"]
    assert split.labels[0].tolist() == [-100, 2, 1, 1, -100, -100, 2, 0, -100]
    assert first_pieces == [{0: 1, 1: 2, 2: 3, 3: 6, 4: 7}]


def test_byte_level_words_keep_the_space_before_them():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("M", "a"), ("Ma", "d"), ("Ġ", "Mad")]
    pieces = [*letters, *("".join(pair) for pair in merges), "<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = RobertaTokenizerFast(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)
    split, first_pieces = ner.encode_words([ner.Sentence(("Mad", "Ma"), ("I-ORG", "O"))], tokenizer, ["I-ORG", "O"], 32)
    assert tokenizer.convert_ids_to_tokens(split.input_ids[0]) == ["<s>", "ĠMad", "Ġ", "Ma", "</s>"]
    assert first_pieces == [{0: 1, 1: 2}]


def test_words_that_were_cut_off_or_have_no_piece_count_as_untagged(tokenizer):
    # The second word is a lone control character: the tokenizer gives it no piece at all.
    sentence = ner.Sentence(("mad", "\u200d", "capsule", "japan"), ("I-ORG", "O", "I-ORG", "I-LOC"))
    tags = ["I-LOC", "I-ORG", "O"]
    split, first_pieces = ner.encode_words([sentence], tokenizer, tags, max_length=4)
    assert set(first_pieces[0]) == {0, 2}
    logits = np.zeros((len(split.input_ids[0]), 3))
    logits[:, 1] = 1.0
    assert ner.word_tags([logits], first_pieces, [sentence], tags) == [["I-ORG", "O", "I-ORG", "O"]]


def test_entity_f1_counts_whole_entities_in_io_tags():
    gold = [["I-ORG", "I-ORG", "O", "I-LOC"]]
    half = ner.entity_metrics(gold, [["I-ORG", "O", "O", "I-LOC"]])
    assert half == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert ner.entity_metrics(gold, gold)["f1"] == 1.0


def test_finding_no_entity_at_all_scores_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ner.entity_metrics([["I-ORG", "O"]], [["O", "O"]])["f1"] == 0.0


def test_classification_metrics_are_those_of_the_papers():
    gold = np.array([1, 1, 0, 0, 1])
    logits = [np.array([1.0 - label, float(label)]) for label in (1, 0, 0, 1, 1)]
    metrics = classification_metrics(logits, gold)
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["majority"] == pytest.approx(3 / 5)
    assert metrics["f1"] == pytest.approx(2 / 3)
    assert metrics["matthews"] == pytest.approx(1 / 6)


def test_correlations_of_a_constant_prediction_are_zero():
    logits = [np.array([0.5])] * 3
    assert regression_metrics(logits, np.array([1.0, 2.0, 3.0])) == {"pearson": 0.0, "spearman": 0.0}


def test_the_interval_is_students_t():
    values = [0.70, 0.74, 0.69]
    interval = student_interval(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert interval.mean == pytest.approx(np.mean(values))
    assert interval.half_width == pytest.approx((high - low) / 2)


def test_one_value_has_no_interval():
    assert student_interval([0.7]).half_width is None


def small_bert() -> BertModel:
    config = BertConfig(
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    return BertModel(config)


def test_the_figures_leave_the_pooler_out():
    figures = encoder_figures(small_bert(), length=32)
    per_layer = 4 * 16 * 16 + 2 * 16 * 32
    assert figures["linear_macs_per_sequence"] == 2 * per_layer * 32
    assert figures["parameters"] == sum(p.numel() for n, p in small_bert().named_parameters() if "pooler" not in n)


def test_multiply_accumulates_of_experts_are_left_to_the_run_that_knows_them():
    model = small_bert()
    model.encoder.layer[0].experts = torch.nn.Module()
    model.encoder.layer[0].experts.w1 = torch.nn.Parameter(torch.zeros(4, 32, 16))
    assert encoder_figures(model, length=32)["linear_macs_per_sequence"] is None


def test_throughput_is_the_median_of_the_counted_batches():
    rows = torch.randint(5, 100, (2, 32))
    throughput = measure_throughput(small_bert(), rows, precision="fp32", max_seconds=0.05)
    assert throughput.slowest <= throughput.tokens_per_ms <= throughput.fastest
    assert (throughput.length, throughput.batch_size) == (32, 2)
    assert throughput.num_batches >= 8
    assert math.isfinite(throughput.tokens_per_ms)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"epochs": -1.0},
        {"learning_rates": (0.0,)},
        {"warmup": 2.0},
        {"dropout": 1.0},
        {"max_malformed": -1},
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        EvalSettings(**settings)
