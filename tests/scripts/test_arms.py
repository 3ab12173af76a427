"""ads/arms.py: which arm settings belong to, and what a stage reads for it."""

import pytest

from ads.arms import ARMS, DEFENCES, arm_of
from ads.data.traces import fingerprint_inputs
from ads.stage.settings import GenConfig

DELTA = ["proxy_student", "gradient"]
PROXY = ["proxy_student"]
STEP = ["proxy_student", "holdout_traces"]


@pytest.mark.parametrize(
    "settings,name,inputs",
    (
        ({"tau": 1.0}, "temperature", []),
        ({"defence": "random"}, "temperature", []),
        ({"lam": 0.03}, "ads", DELTA),
        ({"lam": -0.03}, "negative", DELTA),
        ({"lam": 0.03, "defence": "random"}, "random", DELTA),
        ({"lam": -0.03, "defence": "random"}, "random", DELTA),
        ({"lam": 0.03, "defence": "permuted", "eps": 1e-3}, "permuted", DELTA),
        ({"lam": 0.5, "defence": "corrupt"}, "corrupt", []),
        ({"lam": 0.5, "defence": "poe"}, "poe", PROXY),
        ({"lam": 0.5, "defence": "contrastive", "max_kl": 0.1}, "contrastive", PROXY),
        ({"one_step": 0.1}, "temperature", STEP),
        ({"lam": 0.5, "defence": "corrupt", "one_step": 0.1}, "corrupt", STEP),
        ({"lam": 0.03, "one_step": 0.1, "few_shot": 2}, "ads", [*DELTA, "holdout_traces", "few_shot_traces"]),
    ),
)
def test_what_settings_need(settings, name, inputs, model_folders, tmp_path):
    """In the order of the sidecar; what is not needed is not looked for."""
    paths = {"gradient": "grad_path"}
    for key in ("gradient", "holdout_traces", "few_shot_traces"):
        (tmp_path / key).write_text(key)
        if key in inputs:
            settings = {**settings, paths.get(key, key): str(tmp_path / key)}
    if "proxy_student" in inputs:
        settings = {**settings, "proxy_student": model_folders["proxy"]}
    cfg = GenConfig(teacher=model_folders["teacher"], data_split="arithmetic_train", **settings)
    cfg.check()
    assert cfg.arm.name == name and cfg.has_delta == (inputs[:2] == DELTA)
    assert list(fingerprint_inputs(cfg)) == ["teacher", "tokenizer", "data", *inputs]


def test_no_two_arms_look_alike():
    for column in ("name", "label", "colour", "marker"):
        assert len({getattr(arm, column) for arm in ARMS}) == len(ARMS), column


def test_an_unknown_defence_has_no_arm():
    assert "sideways" not in DEFENCES
    with pytest.raises(KeyError, match="sideways"):
        arm_of({"lam": 0.03, "defence": "sideways"})
