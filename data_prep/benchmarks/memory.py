"""Peak memory of one worker on a dump of any size, generated from the bundled sample.

    python -m data_prep.benchmarks.memory --tokenizer FOLDER [--gigabytes 2] [--workers 1]

The pages of the sample are repeated with new ids until the XML has the wanted size; the job runs as a process of its
own, and the system says how much memory the largest process took. Limit: 1 GB whatever the size.
"""

import bz2
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from data_prep.wikipedia import PageReader

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_prep/samples/wikipedia/enwiki-2016-sample.xml.bz2"


@dataclass(frozen=True)
class Options:
    """What to generate and how to run it."""

    tokenizer: Path
    """A BERT tokenizer folder."""
    gigabytes: float = 2.0
    """Size of the generated XML."""
    workers: int = 1
    """Processes of the job."""


def generate_dump(path: Path, num_bytes: float) -> int:
    """Writes a dump of about `num_bytes` and returns its number of pages."""
    text = bz2.decompress(SAMPLE.read_bytes())
    begin, end = text.index(b"  <page>"), text.rindex(b"</mediawiki>")
    pages = text[begin:end].split(b"</page>\n")[:-1]
    PageReader("sample").feed(text[:begin])  # fails here, not after two gigabytes, if the header were wrong
    written = count = 0
    with open(path, "wb") as file:
        written += file.write(text[:begin])
        while written < num_bytes:
            for page in pages:
                old = page[page.index(b"<id>") : page.index(b"</id>")]
                count += 1
                written += file.write(page.replace(old, b"<id>%d" % count, 1) + b"</page>\n")
        file.write(text[end:])
    return count


def main(argv: list[str] | None = None) -> int:
    """Prints pages, rows and the peak of the largest process; 1 when it is above 1 GB or a page is missing."""
    options = tyro.cli(Options, args=argv)
    folder = Path(tempfile.mkdtemp(prefix="capgap-memory-"))
    try:
        dump = folder / "generated.xml"
        count = generate_dump(dump, options.gigabytes * 1e9)
        command = [sys.executable, "-m", "data_prep.prepare", "--source", str(dump), "--out", str(folder / "out")]
        command += ["--tokenizer", str(options.tokenizer.resolve()), "--workers", str(options.workers)]
        subprocess.run(command, cwd=ROOT, check=True)
        stats = json.loads((folder / "out" / "stats.json").read_text(encoding="utf-8"))
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        peak, seconds = usage.ru_maxrss / 1e6, usage.ru_utime + usage.ru_stime
        print(
            f"{dump.stat().st_size / 1e9:.2f} GB of XML, {count} pages ({stats['documents_in']} read), "
            f"{stats['num_rows']} rows, {seconds:.0f} CPU seconds, largest process {peak:.2f} GB (limit 1 GB)"
        )
        return int(peak > 1.0 or stats["documents_in"] != count)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
