"""The commands that a newcomer types: those of `make demo` at a smaller size, and the lines of Python in the README."""

import re
import shlex
import subprocess
import sys

from launching import PROJECT, environment, free_port

# What makes each command small; the last value of a flag counts.
SMALLER = {
    "pipeline.distill": "--steps 2 --batch.global_size 4 --batch.micro_size 2",
    "score": "--seeds 1 --max-train-examples 8 --max-eval-examples 8 --throughput-batch-size 0",
}


def demo_commands(folder: str) -> list[str]:
    """The commands that `make demo` would run, writing into `folder` instead of demo-out."""
    printed = subprocess.run(["make", "-n", "demo"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    lines = printed.replace("\\\n", " ").splitlines()
    commands = [line for line in lines if re.match(r"(OMP_NUM_THREADS=\d )?(capgap|deepspeed) ", line)]
    return [line.replace("demo-out", folder) for line in commands]


def smaller(command: str, folder: str) -> list[str]:
    words = [word for word in shlex.split(command) if not word.startswith("OMP_NUM_THREADS=")]
    if words[0] == "deepspeed":
        words[1:1] = ["--master_port", str(free_port())]
        student = "minimoe" if "minimoe" in command else "dense"
        words += ["--out", f"{folder}/{student}", "--data.shards", f"{folder}/shards"]
    for name, flags in SMALLER.items():
        if name in words:
            given = dict(zip(flags.split()[::2], flags.split()[1::2], strict=True))
            for flag in [flag for flag in given if flag in words]:
                words[words.index(flag) + 1] = given.pop(flag)
            words += [word for pair in given.items() for word in pair]
    return words


def run(words: list[str]) -> str:
    settings = {"cwd": PROJECT, "env": environment(), "timeout": 250}
    done = subprocess.run(words, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_commands_of_make_demo_and_the_python_of_the_readme(tmp_path):
    folder = str(tmp_path)
    commands = demo_commands(folder)
    assert [line.split()[0] for line in commands].count("deepspeed") == 2 and len(commands) == 7
    for command in commands:
        output = run(smaller(command, folder))
    assert "minimoe" in output and (tmp_path / "report" / "report.html").stat().st_size > 10_000

    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    (python,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    check = "print(model(**tokenizer('A small, fast model.', return_tensors='pt')).last_hidden_state.shape)"
    code = python.replace("demo-out", folder) + check
    assert "torch.Size([1, 8, 384])" in run([sys.executable, "-c", code])

    again = smaller(commands[1], folder)
    assert "complete already" in run(again)
