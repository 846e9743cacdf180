import time

import pytest

from data_prep.benchmarks.agreement import compare
from data_prep.cleaning import HIDDEN_LINKS, clean_wikitext, clean_with_mwparserfromhell


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("'''Bold''' and ''italic'' words.", "Bold and italic words."),
        ("'''''Both''''' of them.", "Both of them."),
        ("The ''Iliad'''s hero is Achilles.", "The Iliad's hero is Achilles."),
        ("An empty ''{{lang|fr|mot}}'' mark here.", "An empty mark here."),
        ("See [[Target]], [[Target|the label]] and [[Target]]s.", "See Target, the label and Targets."),
        ("A [[:Category:Things]] link is shown.", "A Category:Things link is shown."),
        ("[[Category:Things|key]] is not.", "is not."),
        ("[[fr:Chose]]Links to other languages are not shown.", "Links to other languages are not shown."),
        ("[[wikt:word|word]] is shown.", "word is shown."),
        ("[[File:A.jpg|thumb|A [[link]] [1] in {{a|b}} it]]Text after it.", "Text after it."),
        ("The [[Kyrios|κύριος ['Lord']]] made it.", "The κύριος ['Lord'] made it."),
        ("A [http://a.b label] and [http://a.b] bare.", "A label and bare."),
        ("Text{{cite|a={{b|c}}|d}} goes {{on}}.", "Text goes."),
        ("Before.\n{| class=x\n| cell\n{|\n| inner\n|}\n|}\nAfter it all.", "Before.\nAfter it all."),
        ("{{Box|\n{|\n| a\n|}}}\nText after a table in a box.", "Text after a table in a box."),
        ("One<ref name=a>note {{x}} [[y]]</ref> two<ref name=b /> three.", "One two three."),
        ("An unclosed <ref>is text, as far as we can tell.", "An unclosed is text, as far as we can tell."),
        ("x<!-- comment [[ {{ -->y and more.", "xy and more."),
        ("Water is H<sub>2</sub>O &amp; x&nbsp;&lt;&nbsp;y.", "Water is H2O & x < y."),
        ("Line one<br />line two of it.", "Line one line two of it."),
        ("<nowiki>[[literal]]</nowiki> and '''bold'''.", "[[literal]] and bold."),
        ("Energy is <math>E = mc^{2}</math> here, he said.", "Energy is here, he said."),
        ("__NOTOC__Text without the switch.", "Text without the switch."),
        ("Anarchism ({{IPA|x}}; from Greek) is a word.", "Anarchism (from Greek) is a word."),
        ("Alone ({{IPA|x}}, {{y}}) it stands.", "Alone it stands."),
        ("* first item\n** second item\n# third item", "- first item\n- second item\n- third item"),
        ("; term\n: its definition", "term\nits definition"),
        ("== History ==\nText below it.", "History\nText below it."),
        ("== Empty ==\n== Full ==\n=== Part ===\nText below it.", "Full\nPart\nText below it."),
        ("== See also ==\n{{navbox}}", ""),
        ("-{zh-hans:计算机; zh-hant:電腦}-很快，也很好用。", "计算机很快，也很好用。"),
        ("東京は[[日本]]の[[首都]]である。", "東京は日本の首都である。"),
        ("a < b and b > c hold here.", "a < b and b > c hold here."),
        ("", ""),
    ],
)
def test_wikitext_becomes_the_text_a_reader_sees(wikitext, text):
    assert clean_wikitext(wikitext) == text


def test_namespaces_are_hidden_in_the_language_of_the_wiki():
    text = "[[Файл:A.jpg|мини|Текст]]Основен текст. [[Категория:Неща]]"
    assert clean_wikitext(text, HIDDEN_LINKS | {"файл", "категория"}) == "Основен текст."


@pytest.mark.parametrize(
    "mark", ["{{", "}}", "{|", "|}", "[[", "]]", "<ref>", "</ref>", "''", "<!--", "\n{|", "[http://a "]
)
@pytest.mark.fault(12)
def test_markup_without_a_partner_takes_linear_time_and_keeps_the_text(mark):
    text = ("words before it " + mark + " words after it. ") * 5_000
    start = time.process_time()
    cleaned = clean_wikitext(text)
    assert time.process_time() - start < 5
    assert cleaned.startswith("words before it")


@pytest.mark.fault(12)
def test_deep_nesting_takes_linear_time():
    start = time.process_time()
    assert clean_wikitext("{{" * 20_000 + "x" + "}}" * 20_000 + "The text.") == "The text."
    clean_wikitext("[[a|" * 5_000 + "x" + "]]" * 5_000)
    clean_wikitext("<div>" * 20_000 + "x" + "</div>" * 20_000)
    assert time.process_time() - start < 5


def test_our_cleaner_agrees_with_mwparserfromhell(pages):
    """Every 14th article; `python -m data_prep.benchmarks.agreement` compares whole dumps."""
    result = compare(pages[::14], HIDDEN_LINKS)
    assert result.total > 400
    assert result.share >= 0.98
    assert result.classes["other"] <= 0.005 * result.total
    assert not result.leftovers


def test_no_markup_is_left_in_the_sample(pages):
    paragraphs = [line for page in pages for line in clean_wikitext(page.text).split("\n")]
    marked = [line for line in paragraphs if any(mark in line for mark in ("{{", "[[", "<ref", "|}"))]
    assert len(marked) <= len(paragraphs) / 10_000


@pytest.mark.parametrize("clean", [clean_wikitext, clean_with_mwparserfromhell])
def test_both_cleaners_give_lines_without_stray_spaces(clean, pages):
    text = clean(pages[2].text)
    assert all(line == " ".join(line.split()) and line for line in text.split("\n"))
