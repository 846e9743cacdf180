import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.sentences import split_sentences


@pytest.mark.parametrize(
    ("paragraph", "sentences"),
    [
        ("One sentence. Another one! A third?", ["One sentence.", "Another one!", "A third?"]),
        ("Dr. Smith met J. R. Jones, e.g. at noon.", ["Dr. Smith met J. R. Jones, e.g. at noon."]),
        ("The U.S. Army came. So did I. They left.", ["The U.S. Army came.", "So did I.", "They left."]),
        ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
        ("It weighs 3.5 kg. 1984 was a year.", ["It weighs 3.5 kg.", "1984 was a year."]),
        ("He left... and came back. Then so on… Next.", ["He left... and came back.", "Then so on…", "Next."]),
        (
            "東京は首都である。人口は多い！「はい。」と言った。",
            ["東京は首都である。", "人口は多い！", "「はい。」", "と言った。"],
        ),
        ("यह एक वाक्य है। यह दूसरा है।", ["यह एक वाक्य है।", "यह दूसरा है।"]),
        ("Это г. Москва. Он тут.", ["Это г. Москва.", "Он тут."]),
        ("ما هذا؟ هذا كتاب.", ["ما هذا؟", "هذا كتاب."]),
        ("A title\nSt. John went.\n東京。\nJ. Doe", ["A title", "St. John went.", "東京。", "J. Doe"]),
        ("no capital. no cut", ["no capital. no cut"]),
        ("", []),
    ],
)
def test_sentences_end_where_a_reader_stops(paragraph, sentences):
    assert split_sentences(paragraph) == sentences


@given(st.text(alphabet="ab AB\n.!?。！\"') \u0964", max_size=60))
def test_no_character_but_spaces_is_lost(paragraph):
    assert "".join("".join(split_sentences(paragraph)).split()) == "".join(paragraph.split())


def test_most_cuts_are_those_of_syntok(pages):
    import syntok.segmenter

    from data_prep.cleaning import clean_wikitext

    paragraphs = [line for page in pages[1:4] for line in clean_wikitext(page.text).split("\n") if len(line) > 80][:150]
    ours = sum(len(split_sentences(paragraph)) for paragraph in paragraphs)
    same = theirs = 0
    for paragraph in paragraphs:
        cuts = {len("".join(part.split())) for part in _prefixes(split_sentences(paragraph))}
        segments = [
            "".join(token.spacing + token.value for token in sentence)
            for block in syntok.segmenter.process(paragraph)
            for sentence in block
        ]
        other = {len("".join(part.split())) for part in _prefixes(segments)}
        same += len(cuts & other)
        theirs += len(other)
    assert same / theirs > 0.97 and same / ours > 0.97


def _prefixes(parts: list[str]) -> list[str]:
    return ["".join(parts[: index + 1]) for index in range(len(parts))]
