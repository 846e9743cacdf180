# ruff: noqa: B023  (every lambda below runs before its loop variable changes)
"""Speed of data preparation in CPU seconds, one thread, competitors interleaved round by round.

    python -m data_prep.benchmarks.speed [--rounds N] [--tokenizer FOLDER] [--text FOLDER] [--wikiextractor PYTHON]

CPU seconds do not move with the load of a shared machine as wall time does; ratios are taken within a round, and the
table shows the median and the range over rounds. Every figure has its limit beside it. `--text` is a folder of
WikiExtractor output, for speeds on text that the memo has not seen; `--wikiextractor` a Python that has wikiextractor
installed. Without nanotoken its lines are left out.
"""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from data_prep.bz2_streams import decompress
from data_prep.cleaning import clean_wikitext
from data_prep.packing import fill_pairs, plan_pairs
from data_prep.prepare import PrepareConfig, prepare
from data_prep.sentences import split_sentences
from data_prep.shards import open_shards
from data_prep.sources import ReadOptions, open_source, read_source
from data_prep.tokenization import EngineName, MemoEngine, ReferenceEngine, load_reference, make_engine, memo_scheme
from data_prep.wikipedia import PageReader, read_pages

SAMPLE = Path(__file__).parents[1] / "samples/wikipedia/enwiki-2016-sample.xml.bz2"


@dataclass(frozen=True)
class Options:
    """Which rounds, tokenizer, text and competitor."""

    tokenizer: Path
    """A BERT tokenizer folder."""
    rounds: int = 5
    """Rounds of the whole set."""
    text: Path | None = None
    """Folder of WikiExtractor output for unseen text."""
    wikiextractor: Path | None = None
    """Python that can run -m wikiextractor.WikiExtractor."""


@dataclass
class Times:
    """CPU seconds by name, one per round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def measure(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = cpu_seconds()
        result = work(*arguments)
        self.seconds.setdefault(name, []).append(cpu_seconds() - start)
        return result

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> str:
        """How many times `name` costs `base`: the median of the rounds' ratios and their range."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]
        return f"{statistics.median(ratios):.2f}x [{min(ratios):.2f}..{max(ratios):.2f}]"


def cpu_seconds() -> float:
    """User and system time of this process and its finished children."""
    mine, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.ru_utime + mine.ru_stime + children.ru_utime + children.ru_stime


def engine_names() -> list[EngineName]:
    """The engines that are installed here."""
    return ["huggingface", "memo", "nanotoken"] if find_spec("nanotoken") else ["huggingface", "memo"]


def dump_benchmark(options: Options) -> None:
    """bz2 -> XML -> text -> sentences -> tokens -> rows -> files, stage by stage and as one job."""
    times = Times()
    engines = engine_names()
    tokenizer = load_reference(options.tokenizer)
    xml_bytes = sum(map(len, decompress(SAMPLE)))
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(options.rounds):
            chunks = times.measure("bz2", lambda: list(decompress(SAMPLE)))
            pages = times.measure(
                "xml",
                lambda: [p for p in read_pages(chunks, PageReader("sample")) if not p.rejected],
            )
            texts = times.measure("clean", lambda: [clean_wikitext(page.text) for page in pages])
            split = times.measure(
                "sentences",
                lambda: [split_sentences(text) for text in texts],
            )
            flat = [sentence for document in split for sentence in document]
            reference = times.measure("tokens huggingface", lambda: ReferenceEngine(tokenizer).encode(flat))
            scheme = memo_scheme(tokenizer)
            assert scheme is not None
            times.measure("tokens memo", lambda: MemoEngine(tokenizer, scheme).encode(flat))
            if "nanotoken" in engines:
                fast, _ = make_engine("nanotoken", options.tokenizer, [])
                times.measure("tokens nanotoken", lambda: fast.encode(flat))
            counts = iter(reference.counts.tolist())
            per_document = [[next(counts) for _ in document] for document in split]

            def pack(per_document=per_document, ids=reference.ids) -> object:
                plan = plan_pairs(per_document, range(len(per_document)), length=128)
                return fill_pairs(plan, ids, length=128, cls_id=1, sep_id=2, pad_id=0)

            times.measure("rows", pack)
            for engine in engines:
                out = Path(scratch) / f"{engine}-{number}"
                config = PrepareConfig(
                    source=(str(SAMPLE),),
                    out=out,
                    tokenizer=str(options.tokenizer),
                    tokenizer_engine=engine,
                )
                with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                    times.measure(f"job {engine}", prepare, config)
                shutil.rmtree(out)
            if options.wikiextractor:
                command = [str(options.wikiextractor), "-m", "wikiextractor.WikiExtractor", str(SAMPLE.resolve())]
                command += ["-o", f"{scratch}/we-{number}", "--processes", "1", "-q", "--no-templates"]
                times.measure(
                    "wikiextractor", lambda command=command: subprocess.run(command, check=True, capture_output=True)
                )
    print(f"\n## Dump to rows ({xml_bytes / 1e6:.2f} MB of XML, {options.rounds} rounds, CPU seconds)\n")
    print("| stage | seconds | MB of XML/s | to bz2 alone |\n|---|---|---|---|")
    for name in times.seconds:
        seconds = times.median(name)
        print(f"| {name} | {seconds:.3f} | {xml_bytes / 1e6 / seconds:.1f} | {times.ratio(name, 'bz2')} |")
    print("\nlimits: the job costs at most 6x bz2 with memo (the default), at most 4x with nanotoken.")
    if options.wikiextractor:
        ours = [sum(parts) for parts in zip(*(times.seconds[n] for n in ("bz2", "xml", "clean")), strict=True)]
        times.seconds["bz2 + xml + clean"] = ours
        less = [we - bz2 for we, bz2 in zip(times.seconds["wikiextractor"], times.seconds["bz2"], strict=True)]
        times.seconds["wikiextractor less bz2"] = less
        print(
            f"wikiextractor (whole tool) to our cleaning: {times.ratio('wikiextractor', 'clean')} (limit: at least 5x)"
        )
        print(f"wikiextractor less bz2 to our cleaning: {times.ratio('wikiextractor less bz2', 'clean')}")
        print(f"wikiextractor to our bz2 + xml + clean: {times.ratio('wikiextractor', 'bz2 + xml + clean')}")


def text_benchmark(options: Options) -> None:
    """Tokenising text that the memo has not seen, and clean text to shards against the tokenizer's own rate."""
    if options.text is None:
        return
    source = open_source(0, str(options.text))
    documents = []
    for document in read_source(source, ReadOptions(), range_bytes=None):
        documents.append(document.text)  # type: ignore[union-attr]
        if sum(map(len, documents[-50:])) and len(documents) >= 1600:
            break
    half = len(documents) // 2
    warm, unseen = documents[:half], documents[half:]
    lines = [line for text in unseen for line in text.split("\n") if line.strip()]
    tokenizer = load_reference(options.tokenizer)
    scheme = memo_scheme(tokenizer)
    assert scheme is not None
    times = Times()
    reference = ReferenceEngine(tokenizer)
    num_tokens = len(reference.encode(unseen).ids)
    for _ in range(options.rounds):
        memo = MemoEngine(tokenizer, scheme)
        memo.encode(warm)
        times.measure("huggingface encode_batch_fast, documents", lambda: tokenizer.encode_batch_fast(unseen))
        times.measure("huggingface encode_batch_fast, lines", lambda: tokenizer.encode_batch_fast(lines))
        times.measure("memo, unseen documents", memo.encode, unseen)
        times.measure("memo, seen documents", memo.encode, unseen)
        times.measure("memo, cold", lambda: MemoEngine(tokenizer, scheme).encode(unseen))
        if find_spec("nanotoken"):
            fast, _ = make_engine("nanotoken", options.tokenizer, [])
            fast.encode(warm)
            times.measure("nanotoken, unseen documents", fast.encode, unseen)
    base = "huggingface encode_batch_fast, documents"
    print(
        f"\n## Tokenising ({len(unseen)} documents, {sum(map(len, unseen)) / 1e6:.1f} M characters, "
        f"{num_tokens / 1e6:.2f} M tokens; memo warmed on {sum(map(len, warm)) / 1e6:.1f} M other characters)\n"
    )
    print("| engine | seconds | M tokens/s | huggingface documents cost |\n|---|---|---|---|")
    for name in times.seconds:
        seconds = times.median(name)
        print(f"| {name} | {seconds:.3f} | {num_tokens / 1e6 / seconds:.2f} | {times.ratio(base, name)} |")
    print("\nlimits: memo on unseen text at least 2.5x, nanotoken at least 16x.")
    _text_to_shards(options, documents[:400])


def _text_to_shards(options: Options, documents: list[str]) -> None:
    """From text in memory to files, against the engine alone: at least 0.9 of its rate."""
    from data_prep.parts import Part, PartMaker, PartOptions
    from data_prep.sources import Document
    from data_prep.tokenization import describe_tokenizer

    times = Times()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "parts").mkdir()
        shutil.copytree(options.tokenizer, folder / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
        described = describe_tokenizer("tokenizer", folder / "tokenizer")
        clean = ["\n".join(" ".join(line.split()) for line in text.split("\n") if line.strip()) for text in documents]
        part = Part(0, [Document(0, str(n), "", text) for n, text in enumerate(clean)])
        engines = engine_names()
        for _ in range(options.rounds):
            for engine in engines:
                for rows in ("lm-blocks", "bert-pairs"):
                    maker = PartMaker(folder, PartOptions(rows=rows, length=128), described, engine, 1)
                    times.measure(f"{engine}, {rows}", maker.make, part)
                alone, _ = make_engine(engine, folder / "tokenizer", [])
                times.measure(f"{engine}, tokens only", alone.encode, clean)
    print("\n## Clean text to shards\n")
    print("| engine | tokens only, s | lm-blocks, s | rate kept | bert-pairs, s | rate kept |")
    print("|---|---|---|---|---|---|")
    for name in engines:
        alone_name, blocks, pairs = (f"{name}, {what}" for what in ("tokens only", "lm-blocks", "bert-pairs"))
        kept = [f"{times.median(made):.3f} | {times.ratio(alone_name, made)}" for made in (blocks, pairs)]
        print(f"| {name} | {times.median(alone_name):.3f} | {' | '.join(kept)} |")
    print("\nlimit: at least 0.9 of the tokenizer's own rate.")


def read_benchmark(options: Options) -> None:
    """Random batches of 128 rows from mapped shards, against datasets.with_format("numpy")."""
    import datasets

    with tempfile.TemporaryDirectory() as scratch, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        out = Path(scratch) / "shards"
        prepare(PrepareConfig(source=(str(SAMPLE),), out=out, tokenizer=str(options.tokenizer), part_megabytes=1.0))
        shards = open_shards(out)
        loaded = datasets.load_from_disk(str(out)).with_format("numpy")
        rng = np.random.default_rng(0)
        times = Times()
        shards.read(np.arange(shards.num_rows))
        for _ in range(options.rounds):
            batches = [rng.integers(0, shards.num_rows, 128) for _ in range(100)]
            times.measure("capgap", lambda: [shards.read(batch) for batch in batches])
            times.measure("datasets", lambda: [loaded[batch] for batch in batches])
        size = sum(shard.bytes for shard in shards.manifest.shards) / (shards.num_rows * 128)
    tokens = 100 * 128 * 128 / 1e6
    print("\n## Reading random batches of 128 rows\n")
    ours, theirs = (tokens / times.median(name) for name in ("capgap", "datasets"))
    print(f"capgap {ours:.0f} M tokens/s, datasets {theirs:.1f} M tokens/s")
    print(f"datasets costs {times.ratio('datasets', 'capgap')} (limit: at least 10x)")
    print(f"shards: {size:.3f} bytes per token in files of about 0.25 MB (limit: 2.02)")


def main(argv: list[str] | None = None) -> int:
    """Prints all tables."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    options = tyro.cli(Options, args=argv)
    print(
        time.strftime("measured %Y-%m-%d"),
        f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
    )
    dump_benchmark(options)
    text_benchmark(options)
    read_benchmark(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
