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
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            is_set = isinstance(node.ctx, ast.Store)
            if isinstance(module, ModuleType) and not is_set and not hasattr(module, node.attr):
                found.append(f"{node.lineno}: {node.value.id}.{node.attr}")
    return found


def test_what_is_not_there_is_found():
    names = {"json": json, "x": 1}
    assert missing_attributes("json.loads(x.y)\njson.lods(json)", names) == ["2: json.lods"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_script_takes_from_modules_is_there(name, monkeypatch):
    """Two of them had not followed moves: they started, and ended in a traceback minutes later."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delitem(sys.modules, name, raising=False)  # distill.py stands in both folders
    script = importlib.import_module(name)
    assert script.__file__ == str(BENCH / f"{name}.py")
    assert missing_attributes((BENCH / f"{name}.py").read_text(), vars(script)) == []
    sys.modules.pop(name)


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
