"""Who may import whom (the map is in docs/architecture.md), and how large a file may be.

Read from the source: nothing of the project is imported here. An import inside a function counts as well.

    python tests/test_architecture.py      # writes the table of modules in docs/architecture.md anew
"""

import ast
import re
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

# A module directly in ads/ or a room of it may import from its own floor and from those below.
FLOORS = (
    {"arms"},
    {"stage"},
    {"chat", "defences", "kv_cache", "sampling"},
    {"data"},
    {"cpu"},
    {"dual"},
    {"adapters", "loading", "trials"},
    {"decode"},
    {"delta"},
    {"attacks"},
)
# Beside the tower, and only for scripts to import: it may import what is named here.
BESIDE = {"report": "report data stage arms delta.agreement_table"}
MOST_LINES, MOST_FUNCTION_LINES, MOST_MODULES = 400, 45, 8

MAP = ROOT / "docs" / "architecture.md"
START, END = "<!-- modules: python tests/test_architecture.py -->\n", "<!-- end of modules -->\n"

# by a module's name as it is imported: "ads.decode.engine"; "ads.cpu" is its __init__.py, "report" the script
PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("ads/**/*.py")])
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in PATHS.items()}


def imported_by(module):
    """The project's modules that a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{PATHS[module]}: import by the whole name, as elsewhere"
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {whole if whole in PATHS else node.module for whole in names.values()}
    return found & PATHS.keys()


IMPORTS = [(module, other) for module in PATHS for other in sorted(imported_by(module))]


def room_of(module):
    """ "decode" of ads.decode.engine, "chat" of ads.chat; None of a script."""
    return module.split(".")[1] if module.startswith("ads.") else None


def may_import(module, other):
    room, other_room = room_of(module), room_of(other)
    if room is None:
        return True
    if room in BESIDE:
        return not {other_room, other.removeprefix("ads.")}.isdisjoint(BESIDE[room].split())
    height = next((number for number, floor in enumerate(FLOORS) if room in floor), 0)
    return any(other_room in floor for floor in FLOORS[: height + 1])


def functions():
    """(module, function) of every function and method."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [(m, node) for m, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kinds)]


def test_every_module_stands_on_a_floor():
    assert {room_of(module) for module in PATHS} - {None} == set().union(*FLOORS, BESIDE)


def test_no_module_imports_what_stands_above_it():
    assert [f"{module} imports {other}" for module, other in IMPORTS if not may_import(module, other)] == []


def test_no_circle():
    try:
        TopologicalSorter({module: imported_by(module) for module in PATHS}).prepare()
    except CycleError as error:
        pytest.fail(f"each of these imports the next: {' <- '.join(error.args[1])}")


def test_the_room_of_compiled_code_has_one_door():
    """What is in ads/cpu is imported from ads.cpu (its __init__.py), of no module in it."""
    wrong = [(a, b) for a, b in IMPORTS if b.startswith("ads.cpu.") and room_of(a) != "cpu"]
    assert [f"{module} imports {other}" for module, other in wrong] == []


def test_only_report_py_imports_the_report():
    wrong = [(a, b) for a, b in IMPORTS if room_of(b) == "report" and room_of(a) != "report"]
    assert {module for module, _ in wrong} == {"report"}


def test_nothing_imports_a_script():
    """utils.py is the scripts' own: no module of ads/ imports it."""
    wrong = [(a, b) for a, b in IMPORTS if room_of(b) is None and (b != "utils" or a.startswith("ads."))]
    assert [f"{module} imports {other}" for module, other in wrong] == []


def test_no_file_and_no_function_is_long():
    lines = {m: len(path.read_text(encoding="utf-8").splitlines()) for m, path in PATHS.items()}
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}
    lengths = {f"{m}.{f.name}": f.end_lineno - f.lineno + 1 for m, f in functions()}
    assert {name: n for name, n in lengths.items() if n > MOST_FUNCTION_LINES} == {}


def test_few_modules_stand_directly_in_ads():
    assert len(list((ROOT / "ads").glob("*.py"))) <= MOST_MODULES


def tables():
    """A table of each folder of ads/: the modules and the first sentences of their docstrings."""
    text, folder = [], None
    for module in sorted(PATHS, key=lambda module: (PATHS[module].parent, PATHS[module])):
        name, docstring = PATHS[module].relative_to(ROOT), ast.get_docstring(TREES[module])
        if name.parts[0] != "ads" or not docstring:  # a script, or an __init__.py without a word
            continue
        if folder != (folder := name.parent):
            text += ["", f"### `{folder}/`", "", "| module | what it is |", "|---|---|"]
        first = " ".join(docstring.split("\n\n")[0].split()).split(". ")[0].removesuffix(".")
        text.append(f"| [`{name}`](../{name}) | {first}. |")
    return "\n".join([*text, "", ""])


def written_tables():
    """(what stands before the tables in docs/architecture.md, the tables, what stands after)."""
    before, start, rest = MAP.read_text(encoding="utf-8").partition(START)
    found, end, after = rest.partition(END)
    assert start and end, f"{MAP} has lost the line {START} or {END}"
    return before, found, after


def test_the_table_of_modules_is_up_to_date():
    assert written_tables()[1] == tables(), "python tests/test_architecture.py writes it anew"


def test_the_walks_name_files_that_exist_and_none_twice():
    walks = MAP.read_text(encoding="utf-8").partition("## Three walks")[2].partition("\n## ")[0]
    for walk in walks.split("\n### ")[1:]:
        names = re.findall(r"^\d+\. `([\w./]+)`", walk, re.MULTILINE)
        assert len(names) > 8 and len(set(names)) == len(names), walk
        assert [name for name in names if not (ROOT / name).is_file()] == []


if __name__ == "__main__":
    before, _, after = written_tables()
    MAP.write_text(before + START + tables() + END + after, encoding="utf-8")
