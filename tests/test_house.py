"""The house: layers, generated documentation, a README per folder, no machine paths."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import get_args

import pytest

from htnet.config import load as config_io
from htnet.config.prepare import AdapterName, DetectorName, FlowMethod
from htnet.data.datasets import ADAPTERS
from htnet.data.faces.detectors import DETECTORS
from htnet.data.flow.methods import METHODS
from kernels.backends import Backend
from kernels.benchmarks.gpu_check import FOLD_NEEDS, INPUT_NEEDS
from kernels.local_attention.interface import IMPLEMENTATIONS
from launch.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]


def test_rooms_import_only_to_the_right():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_configuration_reference_is_current():
    command = [sys.executable, "-m", "htnet.config.reference"]
    generated = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "configs" / "README.md").read_text(encoding="utf-8") == generated


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_shipped_configuration_loads_and_is_listed(name):
    config_io.load_config(ROOT / "configs" / name)
    assert f"`{name}`" in (ROOT / "configs" / "README.md").read_text(encoding="utf-8")


def test_every_dependency_is_imported_somewhere():
    """Every dependency is imported; another costs an installation, and its absence a step of ``make gpu-check``."""
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for room in ("htnet", "kernels", "launch", "dali_pipelines")
        for path in (ROOT / room).rglob("*.py")
    )
    imported = set(re.findall(r"^\s*(?:import|from) ([\w.]+)", code, re.MULTILINE))
    imported |= {name.rpartition(".")[0] for name in imported}
    needed = re.search(r"install_requires=\[(.*?)\n    \]", (ROOT / "setup.py").read_text(encoding="utf-8"), re.DOTALL)
    distributions = set(re.findall(r'^\s*"([\w-]+)', needed[1], re.MULTILINE))
    other_names = {"opencv-python-headless": "cv2", "pillow": "PIL", "PyYAML": "yaml"}
    modules = {other_names.get(name, name) for name in distributions} | {*FOLD_NEEDS, *INPUT_NEEDS}
    assert len(modules) > 10
    assert modules - imported == set()


def tracked_files() -> list[Path]:
    """List what belongs to the repository, relative to its root; skip the test outside a checkout."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def words_of_code(page: Path) -> list[str]:
    """Code spans and fenced blocks of a Markdown page."""
    return re.findall(r"```.*?```|`[^`\n]+`", page.read_text(encoding="utf-8"), re.DOTALL)


def is_named(path: Path, readme: Path) -> bool:
    """Say whether a README names a file below its folder: itself, by a pattern, or by a folder above it (``data/``)."""
    links = re.findall(r"\]\(([^)#]+)\)", readme.read_text(encoding="utf-8"))
    names = [word.strip("`") for word in words_of_code(readme)] + links
    below = path.relative_to(readme.parent).as_posix()
    patterns = [re.sub(r"<[^>]+>", "*", name) for name in names]
    return any(below.startswith(name) if name.endswith("/") else fnmatch(below, name) for name in patterns)


def test_every_room_has_a_readme_that_names_its_files():
    """Every room has a README, and every README names the files of its folder."""
    files = tracked_files()
    readmes = {path.parent for path in files if path.name == "README.md"}
    rooms = {Path(path.parts[0]) for path in files if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    assert rooms <= readmes
    unnamed = []
    for path in files:
        above = [folder for folder in path.parents if folder in readmes and folder != Path()]
        if above and not path.name.startswith("__") and path.name != "README.md":
            readme = ROOT / above[0] / "README.md"  # the nearest
            unnamed += [] if is_named(ROOT / path, readme) else [f"{above[0] / 'README.md'} does not name {path}"]
    assert not unnamed, "\n".join(unnamed)


def test_no_file_names_one_machine_or_a_package_registry():
    """No file holds a path of one machine or the host of a package registry."""
    machine = re.compile(rb"(?<![\w.~-])/(?:work|root|home)/")
    registry = re.compile(rb"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|(?:extra-)?index[-_]url")
    found = []
    for path in tracked_files():
        content = (ROOT / path).read_bytes()
        if path == Path("tests/test_house.py") or b"\0" in content:  # the rule itself; pictures and arrays
            continue
        for number, line in enumerate(content.splitlines(), start=1):
            found += [f"{path}:{number}: {line.decode()}"] if machine.search(line) or registry.search(line) else []
    assert not found, "\n".join(found)


def test_relative_links_in_the_documentation_lead_somewhere():
    for path in tracked_files():
        if path.suffix == ".md":
            for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / path).read_text(encoding="utf-8")):
                assert (ROOT / path.parent / target).exists(), f"{path}: {target}"


def test_make_targets_of_the_documentation_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in tracked_files():
        if path.suffix == ".md":
            for code in words_of_code(ROOT / path):
                named = set(re.findall(r"(?:^|[\s`])make ([a-z][a-z-]+)", code))
                assert named <= targets, f"{path}: {named - targets}"


def sub_commands() -> set[str]:
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return set(commands.choices)


def test_sub_commands_and_their_documentation_agree():
    """Every sub-command of the documentation exists, and the README names every one."""
    known, named = sub_commands(), {}
    for path in tracked_files():
        if path.suffix == ".md":
            for code in words_of_code(ROOT / path):
                for command in re.findall(r"(?<!from )(?<![\w.])htnet ([a-z][a-z-]*)", code):
                    named.setdefault(command, set()).add(str(path))
    assert {command: pages for command, pages in named.items() if command not in known} == {}
    assert {command for command in known if "README.md" not in named.get(command, ())} == set()


@pytest.mark.parametrize("room", ["htnet.data.frames", "htnet.data.store.frames", "dali_pipelines"])
def test_a_room_can_be_imported_first(room):
    """Each by a new interpreter: a circle of imports shows only where nothing was imported before."""
    subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, check=True)


def test_figures_that_are_quoted_twice_agree():
    """A figure in two places is one number; a fold's seconds are quoted in the README alone."""
    parameters = {
        figure
        for page in ("README.md", "configs/README.md", "htnet/config/model.py")
        for figure in re.findall(r"([\d,]+) parameters", (ROOT / page).read_text(encoding="utf-8"))
    }
    assert len(parameters) == 1
    elsewhere = [path for path in tracked_files() if path.suffix in (".md", ".yaml") and path != Path("README.md")]
    for path in elsewhere:
        if path.parts[:2] != ("docs", "benchmarks") and path != Path("CHANGELOG.md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            assert not re.search(r"seconds a fold|small fold \d+ s", text), path


def test_every_decision_is_listed_on_both_pages():
    decisions = {path.name for path in tracked_files() if path.match("docs/adr/0*.md")}
    listed = set(re.findall(r"`(0\d+-[\w-]+\.md)`", (ROOT / "docs/adr/README.md").read_text(encoding="utf-8")))
    assert listed == decisions
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Decisions with a history")[2]
    assert {int(number) for number in re.findall(r"\((\d+)\)", page)} == {int(name[:4]) for name in decisions}


def test_no_file_is_named_like_a_module_of_python():
    """A file that is run by its path has its folder first on the path, and would shadow that module."""
    named = [path for path in tracked_files() if path.suffix == ".py" and path.stem in sys.stdlib_module_names]
    assert [path for path in named if path.name != "__init__.py"] == []


def nodes_of_the_product() -> list[tuple[str, ast.AST]]:
    """Every node of the product's code, with its file."""
    rooms = ("htnet", "kernels", "launch", "dali_pipelines")
    files = [path for path in tracked_files() if path.suffix == ".py" and path.parts[0] in rooms]
    trees = [(path.as_posix(), ast.parse((ROOT / path).read_text(encoding="utf-8"))) for path in files]
    return [(name, node) for name, tree in trees for node in ast.walk(tree)]


def renames_or_locks(node: ast.AST) -> bool:
    """Tell a rename or a lock; a replace of one argument is Path's, for that of a text takes two."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return "fcntl" in (getattr(node, "module", None), *(alias.name for alias in node.names))
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    of_os = isinstance(node.func.value, ast.Name) and node.func.value.id == "os"
    replaces = node.func.attr == "replace" and (of_os or (len(node.args) == 1 and not node.keywords))
    return replaces or node.func.attr in {"rename", "renames", "hardlink_to", "flock", "lockf"}


def joins_a_path_of_a_run(node: ast.AST) -> bool:
    names = {"folds", "checkpoints", "progress", "events.jsonl", "environment.json", "machine.json"}
    names |= {"summary.json", "predictions.csv", "megc_log.txt", "report.html"}
    return (
        isinstance(node, ast.BinOp)
        and isinstance(node.op, ast.Div)
        and any(isinstance(side, ast.Constant) and side.value in names for side in (node.left, node.right))
    )


def starts_ray(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init"


def test_every_set_of_choices_is_spelled_once():
    """A set of names that a setting takes is one Literal, in the file of its section; all others import it."""
    places: dict[frozenset[str], list[str]] = {}
    for file, node in nodes_of_the_product():
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            places.setdefault(frozenset(ast.literal_eval(node.slice)), []).append(file)
    assert {tuple(sorted(names)): files for names, files in places.items() if len(files) > 1} == {}


@pytest.mark.parametrize(
    ("choices", "table"),
    [
        (get_args(AdapterName), ADAPTERS),
        (get_args(FlowMethod), METHODS),
        (get_args(DetectorName), {"none": None, **DETECTORS}),
        (get_args(Backend), {"auto": None, **IMPLEMENTATIONS}),
    ],
    ids=["adapter", "flow_method", "detector", "attention_backend"],
)
def test_what_a_setting_names_is_implemented(choices, table):
    """Every name that the configuration takes has an implementation, and every implementation a name."""
    assert set(choices) == set(table)


@pytest.mark.parametrize(
    ("does", "home"),
    [
        (renames_or_locks, {"htnet/files.py"}),
        (joins_a_path_of_a_run, {"launch/run/folder.py", "launch/run/training.py"}),  # of a sweep, of a training
        (starts_ray, {"launch/cluster.py"}),
    ],
)
def test_there_is_no_second_way(does, home):
    """One file writes whole files and locks, one each knows the paths of a sweep and a training, one starts Ray."""
    assert {file for file, node in nodes_of_the_product() if does(node)} == home


QUESTION = re.compile(r"(?:What|How|Where|Whether|Why)\b")
NO_VERB = re.compile(r"[^A-Za-z]|(?:The|An?|This|That|These|Those|Its?|Each|Every|All|Both|One|Two|Of|As|In|With)\b")


def texts_of(node: ast.AST) -> list[str]:
    """Collect the strings that stand alone in a body: a docstring first, strings under fields after it."""
    body = getattr(node, "body", None)
    lines = [line.value for line in body if isinstance(line, ast.Expr)] if isinstance(body, list) else []
    return [line.value for line in lines if isinstance(line, ast.Constant) and isinstance(line.value, str)]


def docstring_of_a_function(node: ast.AST) -> str | None:
    """Return the docstring of a function, None for a property and for anything else."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return None
    is_property = any("property" in ast.unparse(name) for name in node.decorator_list)
    return None if is_property else ast.get_docstring(node)


def test_docstrings_begin_with_a_verb_or_a_noun():
    """No string that documents begins with a question word, and none of a function with an article or a sign."""
    found = []
    for file, node in nodes_of_the_product():
        text = docstring_of_a_function(node)
        found += [f"{file}: {text}" for text in texts_of(node) if QUESTION.match(text)]
        found += [f"{file}: {text}"] if text is not None and NO_VERB.match(text) else []
    assert not found, "\n".join(found)


def test_names_of_tests_are_short():
    """A name of a test has at most 60 characters; its docstring holds the sentence."""
    files = [path for path in tracked_files() if path.match("tests/test_*.py")]
    text = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in files)
    assert [name for name in re.findall(r"^ *def (test_\w+)", text, re.MULTILINE) if len(name) > 60] == []
