"""attacks/NAME.yaml: those that are there, one of a user's own, and one line for each mistake."""

import pyarrow.parquet
import pytest
from conftest import ROOT
from helpers_scripts import rows_of

from ads.attacks.recipes import print_recipe, read_recipe
from ads.attacks.rows import ATTACKS, Attack
from ads.stage import files
from ads.stage.errors import UserError

NAMES = sorted(path.stem for path in (ROOT / "attacks").glob("*.yaml"))
THREAT = "threat: {labels: false, clean_traces: 0, queries: 1, models: none}\n"
RIGHT = "label: x\n" + THREAT


def lines(*words):
    return [line.split("\t") for line in print_recipe(*words).splitlines()]


def write(folder, text, name="mine"):
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return str(path)


def test_the_attackers_that_are_there():
    wanted = "naive full correct fluent resample2 resample4 mix10 mix25 mix50 mask10 mask20 reweight_up"
    wanted += " reweight_down repair answer_only prefill solo solo_repair"
    assert sorted(wanted.split()) == NAMES
    recipes = [read_recipe(ROOT / "attacks" / f"{name}.yaml") for name in NAMES]
    assert len({recipe.label for recipe in recipes}) == len(NAMES)
    assert {
        recipe.words["attack"]["attack"] for recipe in recipes if "attack" in recipe.words
    } == ATTACKS.keys()
    for name in NAMES:  # a comment says what it is, where it is from, and why
        text = (ROOT / "attacks" / f"{name}.yaml").read_text()
        comment = " ".join(line for line in text.splitlines() if line.startswith("#"))
        assert "Source:" in comment and ("Why:" in comment or name == "naive"), name


def test_what_is_printed_is_what_pipeline_sh_reads():
    assert lines("naive") == [["naive", "file", str(ROOT / "attacks" / "naive.yaml")]]
    found = lines("resample4", "solo", "full", "reweight_down", "mix10", "prefill")
    assert [line for line in found if line[1] != "file"] == [
        ["resample4", "attack", "attack=resample"],
        ["resample4", "attack", "num_samples=4"],
        ["resample4", "needs", "samples 4"],
        ["resample4", "needs", "student"],
        ["solo", "attack", "attack=solo"],
        ["solo", "needs", "own"],
        ["full", "distill", "lora=false"],
        ["full", "distill", "lr=1e-5"],
        ["full", "distill", "num_epochs=5"],
        ["reweight_down", "attack", "attack=reweight"],
        ["reweight_down", "attack", "beta=-0.5"],
        ["reweight_down", "distill", "weights=true"],
        ["reweight_down", "needs", "student"],
        ["reweight_down", "needs", "holdout_traces"],
        ["mix10", "attack", "attack=mix"],
        ["mix10", "attack", "share=0.1"],
        ["mix10", "needs", "clean_traces"],
        ["prefill", "gentraces", "prefill=auto"],
    ]


def test_a_recipe_of_one_s_own_is_a_path(tmp_path):
    text = "label: mine\n" + THREAT + "distill: {num_epochs: 1, checkpoint: null}\n"
    text += "gentraces: {prefill: start with}\n"
    path = write(tmp_path, text)
    assert lines("naive", path)[1:] == [
        ["mine", "file", path],
        ["mine", "distill", "num_epochs=1"],
        ["mine", "distill", "checkpoint=null"],
        ["mine", "gentraces", "prefill=start with"],
    ]


@pytest.mark.parametrize(
    "text,said",
    (
        ("", "label=None: must be one line of text"),
        ("label: x\n", "threat=None: must have the keys labels, clean_traces, queries, models and no others"),
        (RIGHT + "atack: {}\n", "unknown key 'atack'; known keys: label, threat, attack"),
        (RIGHT.replace("false", "maybe"), "threat: labels='maybe': must be true or false"),
        (RIGHT.replace("traces: 0", "traces: 2"), "threat: clean_traces=2: must be a share"),
        (RIGHT.replace("queries: 1", "queries: 0.5"), "queries=0.5: must be a whole number"),
        (RIGHT.replace("none", "3"), "threat: models=3: must be words"),
        (RIGHT + "attack: [mix]\n", "attack: must hold `key: value` lines, but holds ['mix']"),
        (RIGHT + "attack: {share: 0.1}\n", "attack: attack is not set: give one of correct"),
        (RIGHT + "attack: {attack: mix}\n", "attack: attack=mix: set share, the share of"),
        (RIGHT + "attack: {attack: mx}\n", "attack: attack='mx': must be one of correct"),
        (
            RIGHT + "attack: {attack: mix, share: 2}\n",
            "share=2 in FILE, attack: must be a finite number, at least 0 and at most 1",
        ),
        (
            RIGHT + "attack: {attack: mix, share: .1, beta: 1}\n",
            "attack: beta=1.0: attack=mix has no use for it; leave it out",
        ),
        (RIGHT + "distill: {lrr: 1}\n", "unknown key 'lrr' in FILE, distill; known keys:"),
        (RIGHT + "distill: {lr: 0}\n", "lr=0 in FILE, distill: must be a finite number, above 0"),
        (RIGHT + "distill: {lora: 1}\n", "lora=1 in FILE, distill: must be true or false"),
        (RIGHT + "distill: {seed: 1}\n", "seed=1 in FILE, distill: pipeline.sh sets it"),
        (
            RIGHT + "attack: {attack: mix, share: .1, clean_traces: c}\n",
            "clean_traces='c' in FILE, attack: pipeline.sh sets it; leave it out",
        ),
        (RIGHT + 'gentraces: {prefill: "a\\tb"}\n', "holds a tab or a line break"),
        ("label: [", "is not readable YAML"),
    ),
)  # fmt: skip
def test_a_mistake_is_one_line_with_file_key_and_value(tmp_path, text, said):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as raised:
        print_recipe("naive", path)
    assert said.replace("FILE", path) in str(raised.value) and path in str(raised.value)
    assert "\n" not in str(raised.value)


def test_names_that_are_none_or_would_be_mixed_up(tmp_path):
    for words, said in (
        ((), "ATTACKS is empty: give names of answer_only, correct"),
        (("naif",), "ATTACKS: 'naif' is neither one of answer_only, correct, .* nor a .yaml file"),
        ((f"{tmp_path}/none.yaml",), "nor a .yaml file that is there"),
        (("naive", "naive"), "ATTACKS has naive twice: leave one out"),
        ((write(tmp_path, "", "my attack"),), "rename the file"),
        ((write(tmp_path, "", "correct"),), "attacks/ has a recipe of that name; give the file another one"),
    ):
        with pytest.raises(UserError, match=said):
            print_recipe(*words)


def test_a_path_to_a_recipe_that_is_there_is_that_recipe():
    assert lines(str(ROOT / "attacks" / "mix25.yaml"))[1:] == lines("mix25")[1:]


def shortest(cfg, tables, measure):
    """An attack of one's own: the shorter half of the traces."""
    rows = sorted(tables["traces"], key=lambda row: row["num_tokens"])
    return rows[: len(rows) // 2], {"longest": rows[len(rows) // 2 - 1]["num_tokens"]}


def test_an_attacker_of_one_s_own_is_a_function_a_row_and_a_file(tmp_path, monkeypatch):
    """From the recipe's words to the table that distill.py reads."""
    import attack

    monkeypatch.setitem(ATTACKS, "shortest", Attack(shortest))
    text = RIGHT + "attack: {attack: shortest}\ndistill: {num_epochs: 6}\n"
    printed = lines(write(tmp_path, text, "short"))
    assert printed[1:] == [["short", "attack", "attack=shortest"], ["short", "distill", "num_epochs=6"]]
    row = {"problem": "1 + 1 = ?", "solution": "\\boxed{2}", "trace": "2", "finished": True}
    rows = [row | {"id": f"p/{i}", "num_tokens": 9 - i, "is_raw_correct": True} for i in range(6)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    words = [word for _, section, word in printed if section == "attack"]
    attack.main([*words, f"traces={tmp_path}/train.parquet", f"exp_dir={tmp_path}", "trace_name=a"])
    assert [row["id"] for row in rows_of(tmp_path, "a")] == ["p/5", "p/4", "p/3"]
    stats = files.read_yaml(tmp_path / "traces" / "a.yaml")["stats"]
    assert (stats["n"], stats["longest"]) == (3, 6)
