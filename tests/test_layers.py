"""Who may import whom: the floors of the house, read from the source without running it."""

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from pipeline import cli

PROJECT = Path(__file__).resolve().parent.parent
OURS = {"data_prep", "pipeline", "capgap_kernels"}

JOBS = {module for module, _ in cli.JOBS.values()}
VOCABULARY = {"pipeline.config", "pipeline.signals", "pipeline.ranks"}
FLOORS = ("vocabulary", "parts", "choices", "jobs", "command line")


def module_name(path: Path) -> str:
    inside = path.relative_to(PROJECT)
    parts = inside.parts[1:] if inside.parts[0] == "kernels" else inside.parts
    return ".".join(parts).removesuffix(".py").removesuffix(".__init__")


SOURCES = {
    module_name(path): path
    for folder in ("data_prep", "pipeline", "kernels/capgap_kernels")
    for path in sorted((PROJECT / folder).rglob("*.py"))
    if "benchmarks" not in path.parts
}


def floor(module: str) -> int:
    if module == "pipeline.cli":
        name = "command line"
    elif module in JOBS:
        name = "jobs"
    elif module.startswith("pipeline.eval_tasks"):
        name = "choices"
    elif module in VOCABULARY or not module.startswith("pipeline"):
        name = "vocabulary"
    else:
        name = "parts"
    return FLOORS.index(name)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(module: str, *, at_import_time: bool = False) -> Iterator[tuple[str, int]]:
    """Every absolute name that a module imports, with its line; `from a import b` gives a.b where that is a module."""
    package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST) -> Iterator[tuple[str, int]]:
        if at_import_time and (is_type_checking(node) or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in SOURCES else base), node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(SOURCES[module].read_text(encoding="utf-8")))


def test_the_house_is_found():
    assert {"pipeline.config", "data_prep.shards", "capgap_kernels.reference", "pipeline.models"} <= SOURCES.keys()


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("pipeline")])
def test_imports_point_down_only(module):
    for imported, line in imports(module):
        if imported.split(".")[0] in OURS:
            # A job is lower than nothing but the command line, not even than another job.
            allowed = floor(imported) <= floor(module) and imported not in JOBS
            assert allowed, f"{module}:{line} ({FLOORS[floor(module)]}) imports {imported} ({FLOORS[floor(imported)]})"


def test_nobody_but_the_command_line_names_a_job():
    """The CLI imports them by name when asked, so even it has no import statement for one."""
    for module, path in SOURCES.items():
        for imported, line in imports(module):
            assert imported not in JOBS, f"{module}:{line} imports the job {imported}"
        if module != "pipeline.cli":
            text = path.read_text(encoding="utf-8")
            assert "import_module(" not in text, f"{module} imports by a computed name"


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("data_prep")])
def test_data_prep_knows_neither_torch_nor_the_pipeline(module):
    for imported, line in imports(module):
        assert imported.split(".")[0] not in {"torch", "pipeline", "capgap_kernels", "deepspeed"}, f"{module}:{line}"


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("capgap_kernels")])
def test_the_kernels_need_torch_only_and_triton_only_when_used(module):
    at_import_time = {"torch", "capgap_kernels", *sys.stdlib_module_names}
    if module.endswith("_triton"):
        at_import_time.add("triton")
    for imported, line in imports(module, at_import_time=True):
        assert imported.split(".")[0] in at_import_time, f"{module}:{line} imports {imported}"
        is_self_contained = module.endswith("_triton") or not imported.endswith("_triton")
        assert is_self_contained, f"{module}:{line} pulls in triton through {imported}"
    for imported, line in imports(module):
        # numpy comes with triton's interpreter, for which one of the modules has a repair.
        assert imported.split(".")[0] in {*at_import_time, "triton", "numpy"}, f"{module}:{line} imports {imported}"


def test_what_runs_before_the_first_check_imports_no_torch():
    """A mistake in a recipe shows within two seconds only while this holds."""
    waiting, seen = ["pipeline.distill", "pipeline.cli"], set()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        for imported, line in imports(module, at_import_time=True):
            heavy = imported.split(".")[0] in {"torch", "transformers", "deepspeed", "datasets", "sklearn"}
            assert not heavy, f"{module}:{line} imports {imported}"
            if imported in SOURCES and imported not in seen:
                waiting.append(imported)
    assert "data_prep.shards" in seen


def test_kernels_is_a_workbench_and_not_a_package():
    assert not (PROJECT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's `kernels`"


def test_no_file_is_called_like_a_standard_or_dependency_module():
    """A job launched by path puts its own folder first on sys.path: a tokenize.py in it breaks `import torch`."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions()) - OURS
    files = [*SOURCES.values(), *(PROJECT / "kernels").rglob("*.py"), *(PROJECT / "tests").rglob("*.py")]
    for path in files:
        name = path.parent.name if path.name == "__init__.py" else path.stem
        assert name not in taken, f"{path.relative_to(PROJECT)} hides the module {name}"


def test_tests_mirror_the_tree_and_no_two_share_a_name():
    """Without packages in tests/, pytest imports by the bare name: the second of two namesakes would not be run."""
    names = [path.name for path in (PROJECT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_happens_on_import(module):
    """A module's top level defines things; it calls nothing for its effect and touches no environment."""
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{module} does not say what it is"
    defining = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
    )
    for node in tree.body[1:]:
        if is_type_checking(node) or (isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)):
            continue
        is_field_doc = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert isinstance(node, defining) or is_field_doc, f"{module}:{node.lineno} does something on import"
        if isinstance(node, ast.Assign):
            assert not any("environ" in ast.unparse(target) for target in node.targets), f"{module}:{node.lineno}"
