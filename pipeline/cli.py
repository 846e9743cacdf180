"""`capgap JOB ...`: finds the job's module and hands it the rest of the command line."""

import importlib
import sys

JOBS = {
    "prepare": ("data_prep.prepare", "text to tokenised Arrow shards"),
    "data": ("data_prep.inspect_shards", "verify or show a shard folder"),
    "tokenizer": ("data_prep.tokenizer_tools", "train or extend a sentencepiece tokenizer"),
    "check": ("pipeline.check", "find what would stop a run, before it starts"),
    "doctor": ("pipeline.doctor", "kill and resume a small form of your own run, and compare bit for bit"),
    "upcycle": ("pipeline.upcycle", "turn a dense decoder into a mixture of experts that computes the same"),
    "prune": ("pipeline.prune", "cut a dense decoder down to a smaller shape"),
    "cache": ("pipeline.teacher_cache", "store a teacher's next-token distributions beside the shards"),
    "pretrain": ("pipeline.distill", "train a decoder on text alone: a recipe with teacher.model null"),
    "distill": ("pipeline.distill", "train a student (one process; use deepspeed or srun for several)"),
    "checkpoint": ("pipeline.checkpoint_tool", "show, verify or merge checkpoints"),
    "score": ("pipeline.score", "fine-tune and evaluate a model"),
    "report": ("pipeline.report", "compare runs on one page"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one job and returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        print("usage: capgap JOB [flags]      capgap JOB --help shows a job's flags\n")
        for name, (_, purpose) in JOBS.items():
            print(f"  {name:10} {purpose}")
        return 0 if words else 2
    if words[0] not in JOBS:
        import difflib

        nearest = difflib.get_close_matches(words[0], JOBS, n=1)
        hint = f" - did you mean {nearest[0]}?" if nearest else f" - jobs are {', '.join(JOBS)}"
        print(f"error: unknown job {words[0]}{hint}", file=sys.stderr)
        return 2
    return importlib.import_module(JOBS[words[0]][0]).main(words[1:])


if __name__ == "__main__":
    sys.exit(main())
