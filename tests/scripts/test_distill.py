"""Models whose gradient was wrong, or that were saved as another than was trained: right now, or refused."""

import json
import shutil

import pytest
import torch
from conftest import byte_tokenizer, run_script, save_folder, tiny_model
from helpers_models import sequences
from helpers_training import FAMILIES, config, family, flat_gradient
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from ads import adapters, loading
from ads.attacks.training import check_saved
from ads.delta import gradient
from ads.delta.loss import make_batches
from ads.stage.inputs import fingerprint_model
from ads.trials import logits_of, try_batches


def count_calls(module, found):
    forward = module.forward
    module.forward = lambda *values, **named: found.append(1) or forward(*values, **named)


@pytest.mark.parametrize("name", ("opt", "gpt_bigcode", "seed_oss", "phimoe"))
def test_checkpointing_leaves_the_gradient_as_it_is(name):
    """gradient_checkpointing=true once switched dropout off where it was a torch.nn.Dropout or had a known
    name; where it was a number, as in OPT, the gradient was off by half.

    The two settings count as one stage, so they must be the same gradient.
    """
    rows, calls = sequences(5), []
    plain, ours = (family(name) for _ in range(2))
    wanted = gradient.add_gradient_(plain, rows, len(rows), 2)
    layer = next(m for m in ours.modules() if isinstance(m, loading.GradientCheckpointingLayer))
    count_calls(layer, calls)
    with loading.recomputed(ours):
        assert gradient.add_gradient_(ours, rows, len(rows), 2) == wanted
    assert torch.equal(flat_gradient(ours), flat_gradient(plain))
    assert len(calls) == 2 * len(make_batches(rows, 2)) and not ours.training
    dropped = family(name).train()
    gradient.add_gradient_(dropped, rows, len(rows), 2)
    assert (flat_gradient(dropped) - flat_gradient(plain)).norm() > 0.02 * flat_gradient(plain).norm()


def test_models_without_layers_to_recompute_are_refused():
    with (
        pytest.raises(ValueError, match="gradient_checkpointing=true: a 'openai-gpt' model has no layers"),
        loading.recomputed(family("openai-gpt")),
    ):
        pass


def test_a_model_that_makes_all_logits_has_the_same_gradient():
    """Decoders of some families do not know logits_to_keep, and ended in a traceback."""
    rows = sequences(5)
    ours, plain = (family("trocr") for _ in range(2))
    for s in rows:
        ids, first = torch.tensor(s.ids), s.num_prompt_tokens
        logits_TV = logits_of(plain, s.ids)[first - 1 : -1]
        (torch.nn.functional.cross_entropy(logits_TV, ids[first:]) / len(rows)).backward()
    gradient.add_gradient_(ours, rows, len(rows), 2)
    found, wanted = ([p.grad for p in m.parameters() if p.grad is not None] for m in (ours, plain))
    assert all(torch.allclose(f, w, atol=1e-6) for f, w in zip(found, wanted, strict=True))


def test_a_model_that_sees_later_tokens_is_refused():
    """It sees the padding of a batch too, so that its gradient hung on the batch size."""
    with pytest.raises(ValueError, match="'xlnet' cannot be trained in padded batches .logits change"):
        try_batches(family("xlnet"), 59)


def test_rope_that_depends_on_length_is_refused_where_sequences_get_so_long():
    """The longest row of a batch decided on the positions of all."""
    from transformers import AutoConfig, AutoModelForCausalLM

    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    short = AutoConfig.for_model(
        "llama", **FAMILIES["seed_oss"], max_position_embeddings=40, rope_parameters=rope
    )
    model = AutoModelForCausalLM.from_config(short).eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    try_batches(model, 40)
    with pytest.raises(ValueError, match="come to 60 tokens, but .* only up to 40 .*: set max_length=40"):
        try_batches(model, 60)


def test_what_is_not_finite_is_named_before_and_after_the_passes():
    model = tiny_model()
    model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, torch.inf)
    with pytest.raises(ValueError, match="the gradient of lm_head.weight .* is not finite"):
        gradient.norms(model)
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(ValueError, match="logits of the 'qwen2' model are not finite: check its weights"):
        try_batches(model, 59)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", ("llama", "gemma2", "gpt2", "gpt_neox"))
def test_a_causal_model_is_not(kind, dtype):
    model = tiny_model(kind)
    try_batches(model, 59, dtype)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "name,words",
    (
        ("mamba", "adapters do not work in a 'mamba' model .*incompatible with Mamba"),
        ("phimoe", "adapters do not work in a 'phimoe' model .*'tuple' object has no attribute"),
        ("zamba", "adapters cannot be merged into the weights of a 'zamba' model"),
    ),
)
def test_adapters_that_would_fail_later_are_refused_before_training(name, words, tmp_path):
    """PEFT's tracebacks; and Zamba, whose layers share weights, was trained and then saved as another."""
    with pytest.raises(ValueError, match=f"{words}.*; set lora=false"):
        adapters.add_adapters(family(name), config(tmp_path))


@pytest.mark.parametrize("kind", ("llama", "gemma3_text", "gpt2"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_trying_adapters_out_leaves_no_trace(kind, dtype, tmp_path):
    """To the bit, in 16 bits too."""
    before = tiny_model(kind, 264).to(dtype)
    weights = {name: p.clone() for name, p in before.named_parameters()}
    model = adapters.add_adapters(before, config(tmp_path))
    found = {name.replace("base_layer.", ""): p for name, p in model.get_base_model().named_parameters()}
    added = {name: p for name, p in found.items() if "lora_" in name}
    assert weights and added and found.keys() - added.keys() == weights.keys()
    assert all(p.dtype == dtype and torch.equal(p, found[name]) for name, p in weights.items())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in added.values())
    assert all((p == 0).all() for name, p in added.items() if "lora_B" in name)


def trained(name):
    """A model of a family with adapters that have learned something."""
    torch.manual_seed(0)
    model = family(name) if name in FAMILIES else tiny_model(name, 264)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings)
    for key, p in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.1)
    return model


def test_a_student_that_merging_changes_is_not_kept(tmp_path):
    """By hand on Zamba logits of the saved student were .4 off, and nothing was said."""
    rows = [[3, 1, 4, 1, 5], [9, 2, 6]]
    with pytest.raises(ValueError, match="merging the adapters changed the 'zamba' model's logits"):
        adapters.merge(trained("zamba"), rows)
    wanted = [adapters.logits(trained("llama"), ids) for ids in rows]
    model = adapters.merge(trained("llama"), rows)
    found = [adapters.logits(model, ids) for ids in rows]
    assert all(torch.allclose(f, w, atol=1e-4) for f, w in zip(found, wanted, strict=True))


def test_a_student_that_is_saved_as_another_is_not_kept(tmp_path):
    rows, cfg = [[3, 1, 4, 1, 5], [9, 2, 6]], config(tmp_path)
    model, other = tiny_model("llama", 264, seed=1), tiny_model("llama", 264, seed=2)
    folder = save_folder(tmp_path / "saved", model, byte_tokenizer())
    check_saved(cfg, model, folder, "cpu", rows)
    with pytest.raises(ValueError, match="loaded from where it was saved it is another model"):
        check_saved(cfg, other, folder, "cpu", rows)


def test_a_student_that_could_not_be_loaded_again_is_refused():
    """The text part of a model with pictures is saved as a kind of model that the library does not load."""
    loading.check_loadable(tiny_model("gemma2"))
    with pytest.raises(ValueError, match="a 'mllama_text_model' model could not be loaded again"):
        loading.check_loadable(family("mllama_text_model"))


@pytest.fixture
def folder(tmp_path):
    """A model folder to spoil."""
    return save_folder(tmp_path / "model", tiny_model("llama", 264), byte_tokenizer())


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_weights_of_another_size_are_named(folder, tmp_path):
    """The library raised RuntimeError, or made up what was missing and said so in a log."""
    change(tmp_path / "model" / "config.json", intermediate_size=128)
    words = r"do not belong together: .*down_proj.weight is \(32, 64\), by the configuration \(32, 128\)"
    with pytest.raises(ValueError, match=words):
        loading.load_model(folder, "float32", "cpu")


@pytest.mark.parametrize(
    "values",
    ({"num_attention_heads": 0}, {"hidden_size": "wide"}, {"hidden_act": "none"}, {"model_type": "x"}),
)
def test_a_configuration_that_cannot_be_is_one_line(folder, tmp_path, values):
    change(tmp_path / "model" / "config.json", **values)
    with pytest.raises(ValueError, match=f"model '{folder}' could not be loaded: .") as raised:
        loading.load_model(folder, "float32", "cpu")
    assert "\n" not in str(raised.value)


def test_missing_weights_are_refused_and_unused_ones_said(folder, tmp_path, capsys):
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(weights | {"extra.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    loading.load_model(folder, "float32", "cpu")
    assert "has no use for 1 weights, such as extra.weight" in capsys.readouterr().out
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"is not complete: 1 weights missing, such as {name}"):
        loading.load_model(folder, "float32", "cpu")


def test_an_adapter_beside_weights_or_alone_is_refused(folder, tmp_path):
    """The library added it to the weights without a word; a student so trained could not be saved."""
    model = get_peft_model(tiny_model("llama", 264), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "alone")
    cases = ((folder, "or remove adapter_config.json"), (tmp_path / "alone", "it is no model by itself"))
    for path, words in cases:
        for refuse in (fingerprint_model, lambda name: loading.load_model(name, "float32", "cpu")):
            with pytest.raises(ValueError, match=f"holds an adapter .*merge it into its base model.*{words}"):
                refuse(str(path))
    shutil.copytree(folder, tmp_path / "teacher")
    result = run_script("gentraces.py", f"teacher={tmp_path}/teacher", f"exp_dir={tmp_path}/x", check=False)
    assert result.returncode == 2 and result.stderr.startswith(f"error: {tmp_path}/teacher holds an adapter")
    assert not (tmp_path / "x").exists()
