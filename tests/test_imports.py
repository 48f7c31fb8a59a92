"""The house: which room may import which, and no circles (docs/architecture.md)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
# a room imports rooms of floors below its own, and itself
FLOORS = (
    {"__init__", "checksums", "cores", "errors", "files", "plural", "process", "fastbeit_kernels"},
    {"config"},
    {"data", "engine", "masking"},
    {"model", "tokenizer"},
    {"health", "train"},
    {"weights"},
    {"evaluate"},
    {"jobs"},
    {"verbs", "api"},
    {"cli"},
    {"__main__"},
)


def imports() -> Iterator[tuple[str, str]]:
    """Each import of ours of something of ours, both as dotted names of modules."""
    for path in sorted(path for folder in ("fastbeit", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for name in node.names:
                    is_module = (ROOT / node.module.replace(".", "/") / f"{name.name}.py").exists()
                    yield module, f"{node.module}.{name.name}" if is_module else node.module
            elif isinstance(node, ast.Import):
                yield from ((module, name.name) for name in node.names)


ALL = [pair for pair in imports() if pair[1].split(".")[0] in ("fastbeit", "fastbeit_kernels", "benchmarks")]
OURS = [(module, other) for module, other in ALL if not module.startswith("benchmarks")]


def room(module: str) -> str:
    first, *rest = module.split(".")
    return rest[0] if rest and first == "fastbeit" else "__init__" if first == "fastbeit" else first


def floor(module: str) -> int:
    (number,) = (number for number, rooms in enumerate(FLOORS) if room(module) in rooms)
    return number


def test_rooms_import_what_is_below_them():
    assert len(OURS) > 200
    for module, other in OURS:
        assert room(module) == room(other) or floor(other) < floor(module), f"{module} imports {other}"


def test_there_are_no_circles():
    graph: dict[str, set[str]] = {}
    for module, other in ALL:
        graph.setdefault(module, set()).add(other)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_no_job_imports_a_job_but_the_demo():
    for module, other in OURS:
        if (room(module), room(other)) == ("jobs", "jobs"):
            assert module == "fastbeit.jobs.demo", f"{module} imports {other}"


def test_a_configuration_is_read_without_torch():
    modules = ("pretrain", "finetune", "tokenizer", "read")
    code = "; ".join(f"import fastbeit.config.{name}" for name in modules)
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels')]!r}; {code}; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
