"""Splits text into sentences by punctuation, in any language, without losing a character but spaces."""

import re
from itertools import groupby

# A full stop after one of these does not end a sentence before a name, a number or a title.
ABBREVIATIONS = """mr mrs ms dr prof st sr jr rev hon gen col lt sgt capt cmdr adm gov sen rep pres messrs mme mlle
    vs cf ca viz al ed eds vol vols no nos nr pp fig figs ch sec art op dept univ assoc bros
    fl approx est min max jan feb mar apr jun jul aug sep sept oct nov dec
    bzw usw str hl bd jh geb gest mm гг вв тыс млн млрд им напр""".split()
# Initials ("J.", "U.S.", "z.B."), but not the word I. A look-behind has one width: hence one for each length.
NOT_ABBREVIATED = r"(?<![\s.(\[\"“‘«][^\W\dI_]\.)(?<!\A[^\W\dI_]\.)" + "".join(
    rf"(?<!\b(?i:{'|'.join(words)})\.)" for _, words in groupby(sorted(ABBREVIATIONS, key=len), key=len)
)
NOT_LOWER = r"(?=[^\sa-z\u00df-\u00f6\u00f8-\u00ff\u03b1-\u03c9\u0430-\u044f,;:%)-])"
CLOSERS = r"[\"'\u2019\u201d\u00bb)\]]*"
WIDE = r"[\u3002\uff01\uff1f\uff61]"  # Chinese and Japanese stops, which need no space after them
# A stop (also an ellipsis, Arabic, Urdu or Devanagari) or the end of a line. All alternatives come after one set of
# characters, which the regex engine looks for fastest.
BOUNDARY = re.compile(
    r"[.!?\n\u2026\u061f\u06d4\u0964\u0965\u3002\uff01\uff1f\uff61]"
    rf"(?:(?<=\n)|(?<!{WIDE}){NOT_ABBREVIATED}{CLOSERS}[ ]{NOT_LOWER}"
    rf"|(?<={WIDE}){WIDE}*[\u300d\u300f\u201d\u2019\uff09\"')]* ?(?=\S))"
)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text whose paragraphs are lines and whose spaces are single; none goes beyond its line.

    Joined by single spaces (or nothing, in Chinese) they are the text. A wrong cut costs little in rows of whole
    sentences, so this is a rule with a list of abbreviations and not a model.
    """
    sentences = []
    start = 0
    for match in BOUNDARY.finditer(text):
        end = match.end()
        sentences.append(text[start:end].rstrip())
        start = end
    if start < len(text):
        sentences.append(text[start:])
    return sentences
