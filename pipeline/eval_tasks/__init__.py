"""The list of evaluation tasks: what `capgap score --tasks` accepts."""

from pipeline.eval_tasks import glue, harness, ner, perplexity
from pipeline.eval_tasks.task import Task

TASKS: dict[str, Task] = {
    "cola": glue.COLA,
    "sst2": glue.SST2,
    "mrpc": glue.MRPC,
    "stsb": glue.STSB,
    "qqp": glue.QQP,
    "mnli": glue.MNLI,
    "qnli": glue.QNLI,
    "rte": glue.RTE,
    "wnli": glue.WNLI,
    "conll2003": ner.CONLL2003,
    "wnut17": ner.WNUT17,
    "wikigold": ner.WIKIGOLD,
    "perplexity": perplexity.PERPLEXITY,
    "agreement": perplexity.AGREEMENT,
    "lambada": harness.LAMBADA,
    "blimp": harness.BLIMP,
    "arc_easy": harness.ARC_EASY,
    "arc_challenge": harness.ARC_CHALLENGE,
    "openbookqa": harness.OPENBOOKQA,
    "boolq": harness.BOOLQ,
    "winogrande": harness.WINOGRANDE,
    "mmlu": harness.MMLU,
}

# Names that stand for several tasks. "glue" is what the GLUE score averages; the papers leave out CoLA and WNLI.
GROUPS: dict[str, tuple[str, ...]] = {
    "glue": ("sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"),
    "ner": ("conll2003", "wnut17", "wikigold"),
    "llm": ("perplexity", "lambada", "blimp", "arc_easy", "arc_challenge", "openbookqa", "boolq", "winogrande", "mmlu"),
}
