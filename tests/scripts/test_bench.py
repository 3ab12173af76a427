"""bench/: what its scripts take from modules is there, and what they time runs on the demo's models."""

import ast
import gzip
import importlib
import json
import subprocess
import sys
from types import ModuleType

import pytest
from conftest import ROOT

BENCH = ROOT / "bench"
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py"))


def missing_attributes(source, names):
    """`module.attribute` in Python source that is not there; names: what the module of that source has."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
            module = value_of(node.value, names)
            if isinstance(module, ModuleType) and not hasattr(module, node.attr):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def value_of(node, names):
    """What a name, or a chain of attributes, stands for; None where that is not known."""
    if isinstance(node, ast.Attribute):
        return getattr(value_of(node.value, names), node.attr, None)
    return names.get(node.id) if isinstance(node, ast.Name) else None


@pytest.fixture
def own_modules():
    """bench/ and the root both have a distill.py: other tests go on with the modules that they had."""
    before, path = dict(sys.modules), list(sys.path)
    yield
    for name in sys.modules.keys() - before.keys():
        if str(BENCH) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]
    sys.modules.update(before)
    sys.path[:] = path


def test_what_is_not_there_is_found():
    names = {"json": json, "x": 1}
    source = "json.loads(x.y)\njson.lods(json)\njson.decoder.JSONDecodr()"
    assert missing_attributes(source, names) == ["2: json.lods", "3: json.decoder.JSONDecodr"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_script_takes_from_modules_is_there(name, own_modules):
    """Two of them had not followed moves: they started, and ended in a traceback minutes later."""
    sys.path.insert(0, str(BENCH))
    sys.modules.pop(name, None)
    script = importlib.import_module(name)
    assert script.__file__ == str(BENCH / f"{name}.py")
    assert missing_attributes((BENCH / f"{name}.py").read_text(), vars(script)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    (
        "decode.py {demo}/teacher --proxy {demo}/proxy --data_split arithmetic_test --num 8 --batch 4 "
        "--max_length 200 --lam 8 --threads 1",
        "distill.py {demo}/student {data} --traces 8 --runs 1 --threads 1 --batch_size 4",
    ),
)
def test_it_runs_beside_the_peer(tmp_path, words):
    row = {"question": "1+1=?", "answer": "1 + 1 = 2\n#### 2"}
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((json.dumps(row) + "\n").encode() * 8))
    places = {"demo": ROOT / "demo" / "models", "data": tmp_path / "rows.jsonl.gz"}
    script, *arguments = words.format(**places).split()
    command = [sys.executable, str(BENCH / script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])["ways"]
    assert len(found) >= 3
    if script == "decode.py":
        assert all(figures["tokens_per_second"] > 0 for figures in found.values())
        shares = json.loads(result.stdout.splitlines()[-1])["share_equal"]
        assert shares["plain=peer_plain"] == shares["ads_central=peer_ads"] == 1.0
    else:
        assert all(float(way["loss_difference"]) < 0.02 for way in found)
