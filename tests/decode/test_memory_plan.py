"""What stages take of a GPU's memory: the arithmetic against real models, and refusals before loading."""

import dataclasses
import functools

import families
import pytest
import torch
from conftest import byte_tokenizer, save_folder, tiny_config, tiny_model
from helpers_models import sequences
from helpers_sizes import SHAPES, paper_sizes

import attack
import distill
import gentraces
import save_grad
from ads import adapters, chat
from ads.decode import memory_plan
from ads.decode.cached_model import CachedModel
from ads.delta import gradient, gradient_file
from ads.delta.exact import ExactDerivative
from ads.dual.factors import Factors
from ads.stage.settings import AttackConfig, GenConfig, GradConfig, TrainConfig

KINDS = ("qwen2", "llama", "gemma3_text", "gpt_neox", "gpt2")  # as most families are


def test_parameters_of_the_paper_s_models():
    """As their model cards and bench/floor.py have them."""
    found = [paper_sizes(name).parameters for name in SHAPES]
    known = [7615616512, 1777088000, 3085938688, 494032768, 3212749824, 1235814400, 1543714304, 361821120]
    assert found == known


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_counted_is_what_models_have(kind):
    model, sizes = tiny_model(kind), memory_plan.sizes_of(tiny_config(kind, 97))
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.V == 97
    cached = CachedModel(model, may_fuse=False)
    assert memory_plan.FLOAT * sizes.cached == cached.bytes_per_position


@pytest.mark.parametrize("name", ("falcon", "gpt_bigcode", "gpt2", "youtu"))
def test_caches_of_families_that_keep_other_keys(name):
    """One head for all queries, or latent attention: a formula of Llama's took four times as much."""
    found = memory_plan.FLOAT * memory_plan.sizes_of(families.tiny_config(name)).cached
    assert found == CachedModel(families.build(name), may_fuse=False).bytes_per_position


def test_caches_of_a_family_that_does_not_run_without_numbers():
    class Blind:
        config = tiny_config("llama", 97)

    assert memory_plan.count_cached(Blind(), 8) == memory_plan.sizes_of(Blind.config).cached


@pytest.mark.parametrize("kind", ("qwen2", "llama", "gemma3_text"))
def test_derivatives_take_their_own_positions_and_the_gradient_its_factors(kind):
    model, sizes = tiny_model(kind), memory_plan.sizes_of(tiny_config(kind, 97))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    compressed = gradient.compress(model, 4, 0)
    held = [(g.left, g.right) if isinstance(g, Factors) else (g,) for g in compressed.values()]
    assert sizes.factors(4) == sum(part.numel() for parts in held for part in parts)
    assert sizes.factors(0) == sizes.parameters
    cfg = GenConfig(lam=0.1, dtype="float32", proxy_dtype="float32", answer_force=False, max_length=10)
    plan = memory_plan.decoding(cfg, sizes, sizes, 3, sizes.factors(4))
    delta = ExactDerivative(model, compressed.__getitem__, torch.ones(97, dtype=torch.bool))
    delta.dual.own_step = None  # whose pages are of another size than slots
    delta.dual.try_out()
    assert plan["caches"] == 3 * 10 * (memory_plan.FLOAT * sizes.cached + delta.dual.bytes_per_position)


def test_a_gradient_file_holds_as_many_numbers(tmp_path):
    model, sizes = tiny_model("qwen2"), memory_plan.sizes_of(tiny_config("qwen2", 97))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for rank in (0, 4):
        path = tmp_path / f"{rank}.safetensors"
        gradient_file.save(path, gradient.compress(model, rank, 0), {})
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size - header == memory_plan.FLOAT * sizes.factors(rank)


@pytest.mark.parametrize("kind", ("qwen2", "llama", "gpt_neox", "gpt2"))
def test_adapters_are_as_peft_makes_them(kind):
    cfg = TrainConfig(lora_r=3, student="-")
    model = adapters.add_adapters(tiny_model(kind), cfg)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory_plan.sizes_of(tiny_config(kind, 97)).adapters(3) == trained


class Kept:
    """Bytes that autograd keeps in a forward pass, each piece of memory once, parameters left out."""

    def __init__(self, model):
        self.sizes, self.known = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.sizes[storage.data_ptr()] = (
                storage.nbytes(),
                storage,
            )  # kept, or its place would be taken again
        return tensor

    @property
    def total(self):
        return sum(size for size, _ in self.sizes.values())


def wide_model(kind):
    """Of a layer's usual proportions, each head with its own keys: a CPU's kernel need not repeat them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, vocab_size=97, num_key_value_heads=4, head_dim=16, **sizes)
    return AutoModelForCausalLM.from_config(config), memory_plan.sizes_of(config)


@pytest.mark.parametrize("kind", ("qwen2", "llama"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("rank", (0, 8))
def test_activations_are_what_autograd_keeps(kind, dtype, rank):
    """Of all but the logits, within a tenth: two lengths, so that what does not grow with them falls out."""
    model, sizes = wide_model(kind)
    if rank:
        model = model.to(getattr(torch, dtype))
        model = adapters.add_adapters(model, TrainConfig(lora_r=rank, student="-"))
    found = []
    for num_tokens in (48, 96):
        kept = Kept(model)
        ids = torch.randint(1, 90, (1, num_tokens))
        hooks = torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
        found.append(kept.total)
    per_token = (found[1] - found[0]) / 48
    assert memory_plan.kept(sizes, memory_plan.itemsize(dtype), False, rank) == pytest.approx(
        per_token, rel=0.1
    )


def test_recomputed_layers_keep_their_inputs():
    sizes = paper_sizes("Qwen2.5-3B")
    plain, recomputed = (memory_plan.kept(sizes, 4, is_on) for is_on in (False, True))
    assert recomputed == pytest.approx(36 * 2048 * 4 + plain / 36)


def test_a_model_whose_config_has_no_sizes_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match=f"model '{tmp_path}': no sizes in its config.json"):
        memory_plan.read_sizes(str(tmp_path))


PLAN = {"weights": 30 * memory_plan.GB, "activations": 9 * memory_plan.GB}


def test_a_stage_is_refused_for_what_is_counted_and_warned_of_for_what_is_reckoned(capsys):
    ask = functools.partial(memory_plan.check, PLAN, PLAN, remedy="take another", advice="set a key")
    ask(free=40 * memory_plan.GB)
    assert capsys.readouterr().out == ""
    ask(free=35 * memory_plan.GB)
    said = capsys.readouterr().out
    assert said.startswith("WARNING: this GPU has 35.0 GB free") and "39.0 GB: set a key" in said
    with pytest.raises(ValueError, match="29.0 GB free, but weights 30.0 GB are 30.0 GB: take another"):
        ask(free=29 * memory_plan.GB)


def test_a_cpu_is_not_asked():
    assert memory_plan.room("cpu") is None
    memory_plan.check_decoding(GenConfig(teacher="nothing"), None)
    memory_plan.check_gradient(GradConfig(), [], None)
    memory_plan.check_distillation(TrainConfig(), [], None, 1)
    memory_plan.check_measuring(AttackConfig(), [], None, True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "model"
    return save_folder(path, tiny_model("qwen2", 264), byte_tokenizer())


def exactly(parts):
    """Room for what is counted, to the byte."""
    return memory_plan.peak({k: v for k, v in parts.items() if k != "activations"})


def test_models_and_one_row_must_fit(folder, tmp_path):
    path = tmp_path / "g.safetensors"
    path.write_bytes(bytes(4000))
    cfg = GenConfig(teacher=folder, lam=0.1, proxy_student=folder, grad_path=str(path), max_prompt_length=8)
    sizes = memory_plan.read_sizes(folder)
    free = exactly(memory_plan.decoding(cfg, sizes, sizes, 1, 1000))
    memory_plan.check_decoding(cfg, free)
    with pytest.raises(ValueError, match=f"take smaller models than teacher={folder} and proxy_student"):
        memory_plan.check_decoding(cfg, free - 1)
    with pytest.raises(ValueError, match="or 16-bit dtypes, or free"):
        memory_plan.check_decoding(dataclasses.replace(cfg, dtype="float32"), free)
    plain = dataclasses.replace(cfg, lam=0.0)
    assert 2 * sizes.parameters < exactly(memory_plan.decoding(plain, sizes, None, 1)) < free
    central = exactly(memory_plan.decoding(dataclasses.replace(cfg, eps=1e-2), sizes, sizes, 1, 1000))
    assert central == free + 2 * sizes.parameters - 2 * 1000


def test_the_proxy_its_gradient_and_the_longest_sequence_must_fit(folder):
    cfg, rows, sizes = GradConfig(proxy_student=folder), sequences(5), memory_plan.read_sizes(folder)
    num_logits = max(len(s.ids) - s.num_prompt_tokens for s in rows)
    free = exactly(memory_plan.gradient(cfg, sizes, 0, num_logits))
    assert free == 8 * sizes.parameters + 12 * num_logits * sizes.V
    memory_plan.check_gradient(cfg, rows, free)
    with pytest.raises(ValueError, match=f"take a smaller model than proxy_student={folder}"):
        memory_plan.check_gradient(cfg, rows, free - 1)


def test_the_student_what_is_trained_and_the_longest_sequence_must_fit(folder):
    cfg, sizes = TrainConfig(student=folder, lora_r=2), memory_plan.read_sizes(folder)
    examples = [{"input_ids": [5] * 50, "labels": [chat.IGNORED_LABEL] * 10 + [5] * 40}]
    adapters = sizes.adapters(2)
    free = exactly(memory_plan.distillation(cfg, sizes, 50, 40))
    assert free == 2 * sizes.parameters + (4 + 2 + 4 + 8) * adapters + 14 * 40 * sizes.V
    assert exactly(memory_plan.distillation(cfg, sizes, 50, 40, 2)) == free + 4 * adapters
    assert exactly(memory_plan.trying_adapters(cfg, sizes)) < free
    memory_plan.check_distillation(cfg, examples, free, 1)
    with pytest.raises(ValueError, match=f"take a smaller model than student={folder}, or free"):
        memory_plan.check_distillation(cfg, examples, free - 1, 1)
    whole = dataclasses.replace(cfg, lora=False)
    assert exactly(memory_plan.distillation(whole, sizes, 50, 0)) == (4 + 2 + 4 + 8) * sizes.parameters
    with pytest.raises(ValueError, match="or set lora=true"):
        memory_plan.check_distillation(whole, examples, free, 1)


def test_the_student_that_measures_and_two_gradients_must_fit(folder):
    cfg, sizes = AttackConfig(student=folder), memory_plan.read_sizes(folder)
    examples = [{"input_ids": [5] * 50, "labels": [chat.IGNORED_LABEL] * 10 + [5] * 40}]
    for has_gradients, weight in ((False, 2), (True, 12)):
        free = exactly(memory_plan.measuring(cfg, sizes, 50, 40, has_gradients))
        assert free == weight * sizes.parameters + 12 * 40 * sizes.V
        memory_plan.check_measuring(cfg, examples, free, has_gradients)
        with pytest.raises(ValueError, match=f"take a smaller model than student={folder}, or free"):
            memory_plan.check_measuring(cfg, examples, free - 1, has_gradients)


PROBLEMS = ("max_samples=3", "max_prompt_length=300", "max_length=310")


def small_gpu(device):
    return 1000


@pytest.fixture
def traces(folder, tmp_path):
    """Settings common to the stages, with clean traces of a few generated problems."""
    common = [f"exp_dir={tmp_path}", "seed=1"]
    gentraces.main(
        [*common, f"teacher={folder}", *PROBLEMS, "data_split=arithmetic_holdout", "trace_name=holdout"]
    )
    return common, f"holdout_traces={tmp_path}/traces/holdout.parquet"


def test_stages_ask_before_they_load(folder, traces, monkeypatch, capsys):
    """Each failed after minutes of loading, or of training, with torch's own words."""
    common, holdout = traces
    monkeypatch.setattr(memory_plan, "room", small_gpu)
    gentraces.LOADED.clear()
    capsys.readouterr()
    train = f"train_traces={holdout.split('=')[1]}"
    stages = {
        gentraces: [f"teacher={folder}", *PROBLEMS, "data_split=arithmetic_train"],
        save_grad: [f"proxy_student={folder}", holdout],
        distill: [f"student={folder}", holdout, train],
        attack: ["attack=reweight", "beta=1", f"student={folder}", holdout, train.removeprefix("train_")],
    }
    for stage, words in stages.items():
        with pytest.raises(ValueError, match="this GPU has 0.0 GB free, but weights"):
            stage.main([*common, *words])
    assert "loading" not in capsys.readouterr().out
