"""Splits a paragraph into sentences by punctuation, in any language, without losing a character but spaces."""

import re

NOT_LOWER = r"(?=[^\sa-z\u00df-\u00f6\u00f8-\u00ff\u03b1-\u03c9\u0430-\u044f,;:%)-])"
CLOSERS = r"[\"'\u2019\u201d\u00bb)\]]*"
BOUNDARY = re.compile(rf"[.!?]{CLOSERS}(\s+){NOT_LOWER}")
# Ellipsis, Arabic, Urdu and Devanagari stops need a space after them too; Chinese and Japanese ones do not.
OTHER_STOPS = "\u3002\uff01\uff1f\uff61\u2026\u061f\u06d4\u0964\u0965"
ANY_BOUNDARY = re.compile(
    rf"[.!?\u2026\u061f\u06d4\u0964\u0965]{CLOSERS}(\s+){NOT_LOWER}"
    r"|[\u3002\uff01\uff1f\uff61]+[\u300d\u300f\u201d\u2019\uff09\"')]*(\s*)(?=\S)"
)
# A full stop after one of these does not end a sentence before a name, a number or a title.
ABBREVIATIONS = frozenset(
    """mr mrs ms dr prof st sr jr rev hon gen col lt sgt capt cmdr adm gov sen rep pres messrs mme mlle
    vs v cf ca c e.g i.e viz al ed eds vol vols no nos nr p pp fig figs ch sec art op dept univ assoc bros
    b d r fl approx est min max jan feb mar apr jun jul aug sep sept oct nov dec
    z.b d.h u.a bzw usw str hl bd jh geb gest m mm г гг в вв т тыс млн млрд им напр""".split()
)


def split_sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph in order; joined by single spaces (or nothing, in Chinese) they are the paragraph.

    A wrong cut costs little in rows of whole sentences, so this is a rule with a list of abbreviations and not a model.
    """
    # Most paragraphs of most languages need the first pattern only, which is the faster one.
    boundary = BOUNDARY
    if not paragraph.isascii() and any(stop in paragraph for stop in OTHER_STOPS):
        boundary = ANY_BOUNDARY
    sentences = []
    start = 0
    for match in boundary.finditer(paragraph):
        stop = match.start()
        if paragraph[stop] == "." and _abbreviated(paragraph, start, stop):
            continue
        sentences.append(paragraph[start : match.start(match.lastindex or 0)])
        start = match.end()
    if start < len(paragraph):
        sentences.append(paragraph[start:])
    return sentences


def _abbreviated(text: str, start: int, stop: int) -> bool:
    """Whether the word before the full stop at `stop` is an initial or a known abbreviation."""
    word = text[text.rfind(" ", start, stop) + 1 : stop].lstrip("([\"'“‘«")
    if word == "I":
        return False
    if word == "I":
        return False
    return all(len(part) == 1 and part.isalpha() for part in word.split(".")) or word.lower() in ABBREVIATIONS
