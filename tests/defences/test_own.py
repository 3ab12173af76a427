"""A defence of one's own: a row of ads/arms.py and its score, nothing else; from the grid to the page."""

import csv
import shutil

from conftest import ROOT
from helpers_pipeline import run_pipeline

ROW = """\
    Arm("unsure", "unsure proxy", "unsure", PROXY, SCORES + ":unsure", "lam", "#123456", "#abcdef", "h"),
    Arm("undistilled","""
SCORE = '''

def unsure(step):
    """Towards what the proxy finds neither likely nor unlikely."""
    log_proxy_BV = fill(step)
    return -(log_proxy_BV - log_proxy_BV.mean(-1, keepdim=True)).abs()
'''
GRID = (
    "--points 0.8,0,0 0.8,0.3,0,defence=unsure 0.8,3,0,defence=unsure,max_kl=0.05 "
    "0.8,0.3,0,defence=poe,keep_top1=true"
)


def test_a_row_and_a_score_are_all_that_a_defence_takes(model_folders, problem_folder, tmp_path):
    project = tmp_path / "project"
    ignored = shutil.ignore_patterns(".*", "tests", "runs", "results", "docs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, project, ignore=ignored)
    for name, old, new in (
        ("arms.py", '    Arm("undistilled",', ROW),
        ("defences/scores.py", "\n\ndef fill(step):", f"{SCORE}\n\ndef fill(step):"),
    ):
        path = project / "ads" / name
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
    exp_dir = tmp_path / "x"
    run_pipeline(model_folders, problem_folder, exp_dir, script=str(project / "pipeline.sh"), GRID_ARGS=GRID)
    with (exp_dir / "report" / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["arm"], row["lam"]): row for row in csv.DictReader(file)}
    assert {arm for arm, _ in rows} == {"temperature", "unsure proxy", "PoE", "undistilled"}
    free, capped, poe = rows["unsure proxy", "0.3"], rows["unsure proxy", "3.0"], rows["PoE", "0.3"]
    assert (
        float(free["train_kl"]) > 0 and float(free["train_lam"]) == 0.3 and float(free["train_capped"]) == 0
    )
    assert 0 < float(capped["train_kl"]) <= 0.0501 and float(capped["train_capped"]) > 0.1
    assert 0 < float(poe["train_lam"]) < 0.3 and poe["train_num_models"] == "2"
    assert rows["temperature", "0.0"]["train_kl"] == "0.0" and "student_raw_accuracy" in free
    page = (exp_dir / "report" / "report.html").read_text()
    assert "unsure proxy" in page and "#123456" in page and "#abcdef" in page
    assert not (exp_dir / "traces" / "train_tau0.8_lam0.3_eps0_poe_keep_top1=true").is_file()
    assert (exp_dir / "traces" / "train_tau0.8_lam3_eps0_unsure_max_kl=0.05.parquet").is_file()
