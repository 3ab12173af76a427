"""The models that an arm of the experiment samples with: the teacher, and what adjusts it."""

import functools
import importlib
from dataclasses import replace
from pathlib import Path

import torch

from ads import chat
from ads.decode import memory_plan
from ads.decode.cached_model import CachedModel
from ads.decode.corruption import Corruption
from ads.decode.engine import Models
from ads.delta import central, gradient_file
from ads.delta.exact import ExactDerivative
from ads.delta.plain import PlainProxy
from ads.dual.factors import random_tensor
from ads.loading import load_model
from ads.sampling import Sampling
from ads.stage.inputs import fingerprint_model
from ads.stage.world import print0


def sampling_of(cfg, shared_V=None):
    """The distribution that the traces of a GenConfig are drawn from."""
    plain = Sampling(cfg.tau, 0.0, cfg.top_k, cfg.top_p)
    if not cfg.has_proxy:
        return plain
    module, _, name = cfg.arm.score.partition(":")
    tilt = {"score": getattr(importlib.import_module(module), name), "plausibility": cfg.plausibility}
    return replace(plain, lam=cfg.lam, **tilt, max_kl=cfg.max_kl, keep_top1=cfg.keep_top1, shared_V=shared_V)


def load_models(cfg, tokenizer, vocabulary, device):
    """(engine.Models of a GenConfig, notes for the sidecar).

    vocabulary: what chat.match_vocabularies found of the proxy's tokenizer; None where there is no proxy.
    """
    memory_plan.check_decoding(cfg, memory_plan.room(device))
    proxy, notes = load_proxy(cfg, tokenizer, vocabulary, device) if cfg.has_proxy else (None, {})
    print0(f"loading {cfg.teacher}")
    teacher = load_model(cfg.teacher, cfg.dtype, device, cfg.attn_implementation)
    chat.check_rows(tokenizer, teacher.get_output_embeddings().weight.shape[0], cfg.teacher)
    allowed_V = id_mask(tokenizer, tokenizer.get_vocab().values(), device)
    eos = frozenset(i for i in chat.eos_ids(tokenizer, teacher) if i < len(allowed_V))
    corruption = Corruption(tokenizer, allowed_V, cfg.lam) if cfg.arm.defence == "corrupt" else None
    return Models(CachedModel(teacher), proxy, allowed_V, eos, corruption), notes


def load_proxy(cfg, tokenizer, vocabulary, device):
    """(a delta/proxy.py: Proxy, notes): of its log-probabilities, or of Delta."""
    if cfg.has_delta:
        return load_delta(cfg, tokenizer, vocabulary, device)
    print0(f"loading {cfg.proxy_student} (defence: {cfg.defence})")
    model = load_model(cfg.proxy_student, cfg.proxy_dtype, device, cfg.attn_implementation)
    chat.check_rows(tokenizer, model.get_input_embeddings().weight.shape[0], cfg.proxy_student)
    shared_V = id_mask(tokenizer, vocabulary.shared_ids, device)
    return PlainProxy(model, shared_V), {"ids_not_shared": [list(entry) for entry in vocabulary.differing]}


def load_delta(cfg, tokenizer, vocabulary, device):
    """(what gives Delta, notes): theta +- eps g or, with eps = 0, one proxy in dual numbers."""
    file = gradient_file.open_checked(Path(cfg.grad_path), fingerprint_model(cfg.proxy_student))
    way = f"twice, as theta +- {cfg.eps:g} g" if cfg.eps else "once, to differentiate along g"
    print0(f"loading {cfg.proxy_student} {way} (defence: {cfg.defence})")
    load = functools.partial(load_model, cfg.proxy_student, cfg.proxy_dtype, device, cfg.attn_implementation)
    model = load()
    gradient_file.check_matches(file, cfg.grad_path, model)
    chat.check_rows(tokenizer, model.get_input_embeddings().weight.shape[0], cfg.proxy_student)
    read_gradient = functools.partial(gradient_file.read, file)
    if cfg.arm.defence == "random":
        seed = cfg.seed if cfg.direction_seed is None else cfg.direction_seed
        read_gradient = functools.partial(random_tensor, read_gradient, seed)
    shared_V = id_mask(tokenizer, vocabulary.shared_ids, device)
    notes = {
        "grad_rank": gradient_file.metadata_of(file)["grad_rank"],
        "ids_without_delta": [list(entry) for entry in vocabulary.differing],
    }
    if cfg.eps == 0:
        return ExactDerivative(model, read_gradient, shared_V), notes
    plus, minus = model, load()
    realised = central.perturb_(plus, minus, read_gradient, cfg.eps)
    print0(f"perturbation as stored: {central.describe(realised)}")
    if warning := central.warning(realised, cfg.eps, cfg.proxy_dtype):
        print0(warning)
    notes["perturbation"] = central.describe(realised)
    return central.CentralDifference(plus, minus, cfg.eps, shared_V), notes


def id_mask(tokenizer, ids, device):
    """Bool mask (V,) over the tokenizer's ids, true at `ids`."""
    mask_V = torch.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=torch.bool)
    mask_V[list(ids)] = True
    return mask_V.to(device)
