"""Training with a mask and with weights against plain lines of torch, and as a user runs it."""

import json
import math

import pyarrow.parquet
import pytest
import torch
from conftest import byte_tokenizer, run_script, tiny_model
from helpers_models import sequences
from helpers_scripts import rows_of
from helpers_training import config, examples, family, flat_gradient
from safetensors.torch import load_file

import distill
from ads import chat
from ads.attacks import training, weighting
from ads.data.examples import load_examples
from ads.stage import files
from ads.stage.errors import UserError
from ads.stage.world import World

ALONE = World(0, 1, "cpu")
WEIGHTS = (3.0, 0.5, 1.0, 4.0, 0.25, 2.0, 1.5, 0.75, 6.0)


def weighted_examples(num_rows=9):
    return [example | {"weight": w} for example, w in zip(examples(num_rows), WEIGHTS, strict=False)]


def plain_losses(model, example):
    """-log p (nats) of each label of one example."""
    ids, labels = (torch.tensor(example[key]) for key in ("input_ids", "labels"))
    log_p_TV = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
    keep = labels[1:] != chat.IGNORED_LABEL
    return -log_p_TV[keep].gather(1, labels[1:][keep][:, None]).squeeze(1)


def trained(cfg, model, rows, holdout=None, per_device=2):
    from transformers import set_seed

    set_seed(cfg.seed)
    trainer = training.make_trainer(cfg, model, byte_tokenizer(), rows, holdout, per_device, ALONE)
    training.train_fast(trainer)
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("per_device", (1, 3, 9))
def test_a_step_s_loss_is_the_sum_of_weighted_losses_over_the_step_s_labels(tmp_path, per_device):
    """Whatever gradients are accumulated over. The Trainer's own count of labels stays the denominator."""
    rows = weighting.scaled(weighted_examples())
    model, plain = (tiny_model("llama", 264, seed=3, spread=0.1) for _ in range(2))
    cfg = config(tmp_path, lora=False, lr=1e-4, batch_size=9, num_epochs=1.0)
    trainer = trained(cfg, model, rows, per_device=per_device)
    num_labels = sum(label != chat.IGNORED_LABEL for row in rows for label in row["labels"])
    wanted = sum(row["weight"] * plain_losses(plain, row).sum() for row in rows) / num_labels
    wanted.backward()
    assert logged(trainer, "loss") == pytest.approx([wanted.item()], rel=1e-5)
    assert logged(trainer, "grad_norm") == pytest.approx([flat_gradient(plain).norm().item()], rel=1e-4)
    even = sum(plain_losses(plain, row).sum() for row in rows) / num_labels
    assert abs(wanted.item() - even.item()) > 1e-3, "else weights are not seen"


@pytest.mark.parametrize("per_device", (1, 4))
def test_examples_that_fill_a_step_up_count_nothing(tmp_path, per_device):
    """Of 9 rows in steps of 4, the last step has one and three that fill it up."""
    rows = weighting.scaled(weighted_examples())
    model = tiny_model("llama", 264, seed=3, spread=0.1)
    cfg = config(tmp_path, lora=False, lr=1e-12, weight_decay=0.0, num_epochs=1.0)
    found = logged(trained(cfg, model, rows, per_device=per_device), "loss")
    plain, wanted = tiny_model("llama", 264, seed=3, spread=0.1), []
    order = torch.randperm(9, generator=torch.Generator().manual_seed(cfg.seed)).tolist()
    for step in (order[:4], order[4:8], order[8:]):
        losses = [plain_losses(plain, rows[i]).detach() * rows[i]["weight"] for i in step]
        wanted.append(sum(x.sum().item() for x in losses) / sum(map(len, losses)))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_weights_have_mean_1_over_labels_and_their_scale_is_nothing():
    rows = weighted_examples()
    scaled = weighting.scaled(rows)
    counts = [weighting.num_labels(row) for row in rows]
    assert len(set(counts)) > 1
    mean = sum(row["weight"] * count for row, count in zip(scaled, counts, strict=True)) / sum(counts)
    assert mean == pytest.approx(1)
    ratios = [row["weight"] / w for row, w in zip(scaled, WEIGHTS, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 9)
    huge = weighting.scaled([row | {"weight": row["weight"] * 1e307} for row in rows])
    assert [row["weight"] for row in huge] == pytest.approx([row["weight"] for row in scaled])


def test_weights_of_1_change_nothing(tmp_path):
    curves = []
    for rows in (examples(9), weighting.scaled([row | {"weight": 7.0} for row in examples(9)])):
        model = tiny_model("llama", 264, seed=3, spread=0.1)
        curves.append(logged(trained(config(tmp_path, lora=False, lr=1e-3), model, rows), "loss"))
    assert curves[0] == curves[1] and len(curves[0]) == 6


@pytest.mark.parametrize("share", (0.1, 0.4, 0.9))
def test_the_mask_takes_the_labels_of_highest_loss(tmp_path, share):
    cfg, rows = config(tmp_path, mask_share=share), examples(9)
    model = tiny_model("llama", 264, seed=3)
    (tmp_path / "models" / "student").mkdir(parents=True)
    masked = weighting.weighted(cfg, model, rows, ALONE)
    with torch.no_grad():
        losses = [plain_losses(model, row) for row in rows]
    cut = torch.cat(losses).sort(descending=True).values[round(share * sum(map(len, losses))) - 1]
    by_ids = {tuple(row["input_ids"]): row["labels"] for row in masked}
    num_masked = 0
    for row, losses_N in zip(rows, losses, strict=True):
        places = [i for i, label in enumerate(row["labels"]) if label != chat.IGNORED_LABEL]
        wanted = list(row["labels"])
        for i, loss in zip(places, losses_N, strict=True):
            assert abs(loss - cut) > 1e-4 or loss == cut, "near the edge rounding decides"
            if loss >= cut:
                wanted[i] = chat.IGNORED_LABEL
                num_masked += 1
        found = by_ids.get(tuple(row["input_ids"]))
        assert found == wanted or (found is None and set(wanted) == {chat.IGNORED_LABEL})
    stats = weighting.describe(cfg, rows, masked)
    assert stats == {"num_masked": num_masked} == {"num_masked": round(share * sum(map(len, losses)))}


def test_a_step_s_loss_with_a_mask_is_the_hand_masked_one(tmp_path):
    cfg = config(tmp_path, lr=1e-4, batch_size=9, num_epochs=1.0, mask_share=0.3, weights=True)
    model, plain = (tiny_model("llama", 264, seed=3, spread=0.1) for _ in range(2))
    rows = weighting.weighted(cfg, model, weighted_examples(), ALONE)
    kept = [[i for i, label in enumerate(row["labels"]) if label != chat.IGNORED_LABEL] for row in rows]
    wanted, total = 0.0, 0.0
    for row, places in zip(rows, kept, strict=True):
        log_p_TV = plain(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        losses = [-log_p_TV[i - 1, row["input_ids"][i]] for i in places]
        wanted, total = wanted + row["weight"] * sum(losses), total + row["weight"] * len(places)
    num_kept = sum(map(len, kept))
    assert total == pytest.approx(num_kept), "weights are scaled over what is left"
    assert logged(trained(cfg, model, rows, per_device=3), "loss") == pytest.approx(
        [wanted.item() / num_kept], rel=1e-5
    )


def test_of_equal_losses_the_first_are_masked(tmp_path):
    rows = examples(3)
    losses = [torch.ones(weighting.num_labels(row)) for row in rows]
    losses[1][0] = 2.0
    first = [i for i, label in enumerate(rows[0]["labels"]) if label != chat.IGNORED_LABEL]
    total = sum(map(len, losses))
    mask = weighting.least_likely(losses, 3.2 / total, rows)
    assert mask == [first[:2], [sequences(3)[1].num_prompt_tokens], []]


def test_the_mask_is_the_same_with_adapters_and_dropout(tmp_path):
    """Adapters at their start change nothing, and dropout, which a model or its adapters may have, is off
    meanwhile."""
    masks = []
    for name in ("plain", "training", "adapters"):
        cfg = config(tmp_path / name, lora_dropout=0.5, mask_share=0.2)
        model = family("opt")  # which has dropout
        if name == "adapters":
            model = training.adapters.add_adapters(model, cfg)
        model.train(name != "plain")
        weighting.weighted(cfg, model, examples(9), ALONE)
        assert model.training == (name != "plain")
        masks.append(json.loads(cfg.mask_path.read_text()))
    assert masks[0] == masks[1] == masks[2] and sum(map(len, masks[0])) > 10


def test_a_mask_that_leaves_no_token_is_refused():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    assert weighting.count_masked(0.5, rows) == 1
    with pytest.raises(ValueError, match=r"mask_share=0.9: leaves none of 2 tokens to train on; lower it"):
        weighting.count_masked(0.9, rows)


def arguments(models, exp, exp_dir, *more):
    traces = [f"holdout_traces={exp}/traces/holdout.parquet", f"train_traces={exp}/traces/weighted.parquet"]
    recipe = ["lora_r=4", "batch_size=10", "num_epochs=2", "lr=1e-3"]
    return [f"exp_dir={exp_dir}", f"student={models['student']}", *traces, *recipe, *more]


@pytest.fixture(scope="module")
def traces(exp):
    """The holdout traces with a column weight."""
    rows = rows_of(exp, "holdout")
    for i, row in enumerate(rows):
        row["weight"] = 0.2 + i % 4
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), exp / "traces" / "weighted.parquet")
    return exp


BOTH = ("mask_share=0.2", "weights=true")


@pytest.fixture(scope="module")
def student(model_folders, traces, tmp_path_factory):
    """A student with a mask and weights, made by one process."""
    folder = tmp_path_factory.mktemp("student")
    distill.main(arguments(model_folders, traces, folder, *BOTH))
    return folder


def result_of(folder):
    sidecar = files.read_yaml(folder / "models" / "student.yaml")
    return sidecar, load_file(folder / "models" / "student" / "final" / "model.safetensors")


def assert_same(one, two):
    (record, weights), (other, others) = one, two
    found, wanted = ([loss for _, loss in r["losses"]["train"]] for r in (record, other))
    assert found == pytest.approx(wanted, rel=1e-5)
    for key in ("holdout_loss", "num_masked", "weight_min", "weight_max"):
        assert record["stats"][key] == pytest.approx(other["stats"][key], rel=1e-5)
    assert all(torch.allclose(weights[k], others[k], atol=1e-5) for k in weights)


def test_two_processes_train_the_same_student(student, model_folders, traces, tmp_path):
    """The last step has 2 of 10 sequences: most micro-batches have none."""
    run_script("distill.py", *arguments(model_folders, traces, tmp_path, *BOTH), num_processes=2)
    assert_same(result_of(student), result_of(tmp_path))
    masks = [(folder / "models" / "student" / "mask.json").read_text() for folder in (student, tmp_path)]
    assert masks[0] == masks[1]


def test_sidecar_tells_what_was_masked_and_the_holdout_loss_is_of_all_tokens(
    student, model_folders, traces, tmp_path
):
    distill.main(arguments(model_folders, traces, tmp_path, "num_epochs=1"))
    record, plain = (files.read_yaml(folder / "models" / "student.yaml") for folder in (student, tmp_path))
    stats = record["stats"]
    assert stats["holdout_loss_start"] == plain["stats"]["holdout_loss_start"]
    assert stats["train_loss"] != plain["stats"]["train_loss"]
    assert not {"num_masked", "weight_min", "weight_max"} & plain["stats"].keys()
    mask = json.loads((student / "models" / "student" / "mask.json").read_text())
    assert stats["num_masked"] == sum(map(len, mask)) > 50 and len(mask) == stats["n"] == 12
    assert stats["weight_max"] / stats["weight_min"] == pytest.approx(3.2 / 0.2, rel=1e-3)
    assert record["sequences"] != plain["sequences"], "weights are part of what is trained on"
    assert not (tmp_path / "models" / "student" / "mask.json").exists()


class Stopped(Exception):
    pass


def be_stopped(*_, **__):
    raise Stopped


def test_a_resumed_run_uses_the_mask_of_the_first(student, model_folders, traces, tmp_path, monkeypatch):
    """From a checkpoint on, though the student's losses are others by then; and where it came to none."""
    words = arguments(model_folders, traces, tmp_path, *BOTH, "save_epochs=0.5")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(training, "save_student", be_stopped)
        distill.main(words)
    assert training.newest_checkpoint(tmp_path / "models" / "student")
    with monkeypatch.context() as patch:
        patch.setattr(weighting, "label_losses", be_stopped)
        distill.main(words)
    assert_same(result_of(student), result_of(tmp_path))
    again = tmp_path / "again"
    words = arguments(model_folders, traces, again, *BOTH)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(training, "make_trainer", be_stopped)
        distill.main(words)
    path = again / "models" / "student" / "mask.json"
    mask = [positions[1:] for positions in json.loads(path.read_text())]
    path.write_text(json.dumps(mask))
    with pytest.raises(ValueError, match="unfinished work.*mask_share was 0.2, now 0.3"):
        distill.main([*words, "mask_share=0.3"])
    distill.main(words)
    assert result_of(again)[0]["stats"]["num_masked"] == sum(map(len, mask))


def test_students_from_before_these_keys_count_as_done(model_folders, traces, tmp_path, capsys):
    words = arguments(model_folders, traces, tmp_path, "num_epochs=1", "do_eval=false")
    distill.main(words)
    path = tmp_path / "models" / "student.yaml"
    record = files.read_yaml(path)
    assert (record["config"].pop("mask_share"), record["config"].pop("weights")) == (0.0, False)
    files.write_text(path, files.yaml.safe_dump(record, sort_keys=False))
    with pytest.raises(SystemExit, match="0"):
        distill.main(words)
    assert "student.yaml is there: nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="mask_share was 0.0, now 0.1"):
        distill.main([*words, "mask_share=0.1"])


@pytest.mark.parametrize(
    "weight,words",
    (
        (0.0, "row 1: weight must be a finite number above 0, but is 0.0"),
        (-1.0, "but is -1.0"),
        (math.nan, "but is nan"),
        (math.inf, "but is inf"),
        (None, "but is None"),
        ("absent", "row 0: no column weight, which weights=true needs"),
    ),
)
def test_weights_that_cannot_be_are_refused(exp, weight, words, tmp_path):
    rows = rows_of(exp, "holdout")[:2]
    for k, row in enumerate(rows):
        row |= {} if weight == "absent" else {"weight": weight if k else 2}
    rows = [row | ({"weight": float(row["weight"])} if row.get("weight") else {}) for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    with pytest.raises(ValueError) as error:
        load_examples(config(tmp_path), byte_tokenizer(), tmp_path / "t.parquet", with_weights=True)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_trained_on_is_told_before_a_model_is_loaded(model_folders, exp, tmp_path, capsys):
    table = [{**row, "trace": "", "finished": True} for row in rows_of(exp, "holdout")[:1]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "t.parquet")
    common = [f"exp_dir={tmp_path}/x", f"student={model_folders['student']}", "do_eval=false",
              f"train_traces={tmp_path}/t.parquet"]  # fmt: skip
    for word, told in (("weights=true", "no column weight"), ("mask_share=0.6", "leaves none of 1 tokens")):
        with pytest.raises(UserError, match=told):
            distill.main([*common, word])
    assert "loading" not in capsys.readouterr().out
