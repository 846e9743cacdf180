"""How often our cleaner and mwparserfromhell give the same paragraph of a dump, and how they differ where they do not.

python -m data_prep.benchmarks.agreement [DUMP ...]
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from data_prep.bz2_streams import decompress
from data_prep.cleaning import clean_wikitext, clean_with_mwparserfromhell
from data_prep.errors import DataError
from data_prep.wikipedia import Page, PageReader

SAMPLE = Path(__file__).parents[1] / "samples/wikipedia/enwiki-2016-sample.xml.bz2"
MARKUP = re.compile(r"''|<ref|\[\[|\{\{|\]\]|\}\}|__[A-Z]+__|\|\w+ ?=")
LEFTOVER = re.compile(r"\{\{|\[\[|<ref|\|\}")


@dataclass
class Agreement:
    """Counts of paragraphs, and for each class of difference its number and examples (ours, oracle's)."""

    same: int = 0
    total: int = 0
    ours: int = 0
    leftovers: list[str] = field(default_factory=list)  # our paragraphs with markup in them
    classes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        return self.same / self.total


def compare(pages: list[Page], hidden: frozenset[str]) -> Agreement:
    """Cleans every page both ways and matches the paragraphs, page by page."""
    result = Agreement()
    for page in pages:
        ours = Counter(clean_wikitext(page.text, hidden).split("\n"))
        oracles = Counter(clean_with_mwparserfromhell(page.text, hidden).split("\n"))
        result.same += (ours & oracles).total()
        result.total += max(ours.total(), oracles.total())
        result.ours += ours.total()
        result.leftovers += [paragraph for paragraph in ours if LEFTOVER.search(paragraph)]
        _classify(result, list((ours - oracles).elements()), list((oracles - ours).elements()))
    return result


def _classify(result: Agreement, only_ours: list[str], only_oracle: list[str]) -> None:
    left = list(only_oracle)
    for paragraph in only_ours:
        near = get_close_matches(paragraph, left, 1, 0.6) if len(paragraph) < 20_000 else []
        if near:
            left.remove(near[0])
        _add(result, name_difference(paragraph, near[0] if near else ""), paragraph, near[0] if near else "")
    for paragraph in left:
        _add(result, name_difference("", paragraph), "", paragraph)


def _add(result: Agreement, name: str, ours: str, oracles: str) -> None:
    result.classes[name] += 1
    result.examples.setdefault(name, []).append((ours, oracles))


def name_difference(ours: str, oracles: str) -> str:
    """The class of one difference."""
    if MARKUP.search(oracles) and not MARKUP.search(ours):
        return "the oracle leaves markup that it cannot pair"
    if ours.replace(" ", "") == oracles.replace(" ", ""):
        return "we put a space where a block tag divides words"
    if ours.replace("'", "").replace(" ", "") == oracles.replace("'", "").replace(" ", ""):
        return "apostrophes beside quote marks"
    if not oracles:
        return "the oracle loses text after an unclosed tag or brace"
    if not ours:
        return "the oracle keeps rows of broken tables and headings of emptied sections"
    return "other"


def main(paths: list[str]) -> int:
    """Prints share, classes and examples per dump."""
    for path in map(Path, paths or [str(SAMPLE)]):
        reader = PageReader(path.name)
        pages: list[Page] = []
        try:
            for chunk in decompress(path):
                pages += [page for page in reader.feed(chunk) if not page.rejected]
        except DataError as error:
            print(f"note: {error}")
        result = compare(pages, reader.names.hidden())
        print(f"{path.name}: {result.same} of {result.total} paragraphs agree ({100 * result.share:.2f} %)")
        print(f"  with leftover markup: {len(result.leftovers)} of {result.ours}")
        for name, count in result.classes.most_common():
            print(f"  {count:>5} {name}")
            for ours, oracles in result.examples[name][:2]:
                at = next((i for i, (a, b) in enumerate(zip(ours, oracles, strict=False)) if a != b), 0)
                start = max(0, at - 40)
                print(f"          ours   {ours[start : at + 60]!r}\n          oracle {oracles[start : at + 60]!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
