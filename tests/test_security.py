"""What must not appear in the product's source: ways in which bytes from outside become code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
READS_YAML = ("topology/plainyaml.py", "from yaml import …")
"""It makes nodes of the text and values of these; no other file may, and none may make objects."""
FOLDERS = ("src/hortator", "producer", "workers", "topology")

MODULES = frozenset(
    {
        "pickle",
        "_pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "joblib",
        "marshal",
        "shelve",
        "yaml",
        "ruamel",
        "jsonpickle",
    }
)
BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
CALLS = frozenset(
    {"torch.load", "torch.jit.load", "numpy.load", "np.load", "os.system", "os.popen", "subprocess.getoutput"}
)
FLAGS = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}
OBJECT_COLLECTIVES = ("_object", "_object_list")  # torch.distributed pickles in all of these
CONTENT_TYPES = frozenset({"pickle", "yaml", "application/x-python-serialize", "application/x-yaml"})


def sins(source: str) -> Iterator[str]:
    """Everything forbidden in one file, with its line."""
    for node in ast.walk(ast.parse(source)):
        line = f"line {getattr(node, 'lineno', 0)}: "
        match node:
            case ast.Import(names=names):
                yield from (f"{line}import {a.name}" for a in names if a.name.split(".")[0] in MODULES)
            case ast.ImportFrom(module=str(module), names=names):
                if module.split(".")[0] in MODULES:
                    yield f"{line}from {module} import …"
                yield from (f"{line}{module}.{a.name}" for a in names if f"{module}.{a.name}" in CALLS)
                yield from (f"{line}{a.name}" for a in names if pickling_collective(module, a.name))
            case ast.Call(func=func, keywords=keywords):
                if isinstance(func, ast.Name) and func.id in BUILTINS:
                    yield f"{line}{func.id}()"
                for keyword in keywords:
                    value = getattr(keyword.value, "value", None)
                    if keyword.arg in FLAGS and value is FLAGS[keyword.arg]:
                        yield f"{line}{keyword.arg}={value}"
                    if keyword.arg in ("serializer", "task_serializer", "result_serializer") and value in CONTENT_TYPES:
                        yield f"{line}{keyword.arg}={value!r}"
            case ast.Attribute():
                name = ast.unparse(node)
                if name in CALLS:
                    yield line + name
                if pickling_collective(name, node.attr):
                    yield line + name


def pickling_collective(where: str, name: str) -> bool:
    return "dist" in where and name.endswith(OBJECT_COLLECTIVES)


def product_files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_the_product_has_no_way_to_turn_bytes_into_code() -> None:
    files = product_files()
    assert {path.relative_to(ROOT).parts[0] for path in files} == {"src", "producer", "workers", "topology"}
    found = [f"{path.relative_to(ROOT)} {sin}" for path in files for sin in sins(path.read_text(encoding="utf-8"))]
    assert [sin for sin in found if not (sin.startswith(READS_YAML[0]) and sin.endswith(READS_YAML[1]))] == []


def test_the_file_that_reads_yaml_imports_nothing_that_makes_objects() -> None:
    tree = ast.parse((ROOT / READS_YAML[0]).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "yaml"]
    names = {alias.name for node in imports for alias in node.names}
    assert names == {"AliasEvent", "MappingNode", "Node", "SafeLoader", "ScalarNode", "SequenceNode", "YAMLError"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import dill as d",
        "from marshal import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import yaml\nyaml.load(b)",
        "from yaml import load",
        "eval('1')",
        "exec(code)",
        "f = __import__(name)",
        "dist.broadcast_object_list(x)",
        "torch.distributed.all_gather_object(x, y)",
        "from torch.distributed import send_object_list",
        "subprocess.run('x', shell=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "np.load(f, allow_pickle=True)",
        "os.system('x')",
        "app.send_task('x', serializer='pickle')",
    ],
)
def test_the_lint_finds(source: str) -> None:
    assert list(sins(source))


def test_the_lint_lets_ordinary_code_pass() -> None:
    innocent = (
        "import json, os, torch\nos.execve(a, b, c)\ntorch.compile(m)\nx.load(y)\nrun(shell=False)\nre.compile('x')\n"
    )
    assert list(sins(innocent)) == []


def test_lua_scripts_make_no_code_from_strings() -> None:
    scripts = sorted(ROOT.glob("producer/**/*.lua"))
    assert scripts, "the store is made of Lua scripts"
    assert [s.name for s in scripts if any(word in s.read_text() for word in ("loadstring", "load(", "dofile"))] == []
