"""What a model is tried for before it is used: caches, lengths, windows, batches, derivatives."""

import families
import pytest
import torch
from families import WINDOW

from ads.decode.cached_model import CachedModel
from ads.decode.engine import Models, generate
from ads.decode.rows import Request
from ads.delta.check import make_checked, reverse
from ads.sampling import GREEDY
from ads.trials import NUM_SHORT, TRIED, CheckedLookups, holds, tried_ids, try_batches

ALL = torch.ones(families.VOCABULARY, dtype=torch.bool)


def decode(model, num_prompt, num_new):
    models = Models(CachedModel(model), None, ALL, frozenset({families.VOCABULARY - 1}))
    return list(generate(models, GREEDY, 1, [Request("a", list(range(5, 5 + num_prompt)), num_new)], 4))


@pytest.mark.parametrize(
    "name, fitting, reason",
    [
        ("llama dynamic", WINDOW, "short rows follow the longest"),
        ("phi3 longrope", WINDOW, "short rows follow the longest"),
        ("gpt_neo", WINDOW, "short rows follow the longest"),
        ("gpt2 of 48 positions", 48, "position 59 of a table of 48"),
        ("opt of 48 positions", 48, "position 61 of a table of 50"),
    ],
)
def test_rows_may_come_as_far_as_they_are_decoded_right(name, fitting, reason):
    """Cached keys kept the angles of another length, short rows got those, or the window, of the longest;
    more tokens than positions ended in a traceback, on a GPU in the end of the process."""
    with pytest.raises(
        ValueError, match=f"come to 60 tokens.* only up to {fitting} .*{reason}.*by {60 - fitting}$"
    ):
        decode(families.build(name), 30, 30)
    assert decode(families.build(name), 30, fitting - 30)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("bert not causal", "logits with a cache are not those without"),
        ("bart", "logits with a cache are not those without"),
        ("bloom", "too many values to unpack"),
        ("rwkv", "keeps no keys and values in the cache"),
        ("recurrent_gemma", "linear_attention layers"),
        ("moshi", "logits with a cache are not those without"),  # it has a window and does not use it
    ],
)
def test_what_a_cache_of_slots_cannot_hold_is_refused_at_load(name, reason):
    """BERT's and BART's families were decoded wrong without a word, BLOOM's cache ended in a traceback."""
    with pytest.raises(ValueError, match=f"{reason}.*: take another model"):
        CachedModel(families.build(name))


def make_unsteady(model):
    """The embedding of one id, the last that models are tried with first, is another each time."""
    *_, unsteady = tried_ids(model, TRIED + NUM_SHORT)
    assert all(unsteady not in tried_ids(model, TRIED + NUM_SHORT, attempt) for attempt in (1, 2))
    generator = torch.Generator().manual_seed(0)

    def add_noise(table, inputs, output):
        noise = torch.randn(table.embedding_dim, generator=generator).to(output.dtype)
        return output + (inputs[0] == unsteady)[..., None] * noise

    model.get_input_embeddings().register_forward_hook(add_noise)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_what_rounding_may_have_done_is_tried_with_other_ids(dtype):
    """A student in bfloat16, of an architecture that works, was refused after its training on a GPU, most
    likely since the logits of the one row tried hung on the order of sums."""
    model = families.build("llama").to(dtype)
    make_unsteady(model)
    if dtype == torch.float32:
        with pytest.raises(ValueError, match="logits with a cache are not those without"):
            CachedModel(model)
        with pytest.raises(ValueError, match="change with the tokens that follow"):
            try_batches(model, WINDOW)
    else:
        cached = CachedModel(model)
        cached.try_length(60)
        assert cached.own_step is not None
        try_batches(model, WINDOW)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_two_of_three_attempts_decide_in_16_bits(dtype):
    asked = []

    def attempts(*answers):
        asked.clear()
        return holds(lambda attempt: asked.append(attempt) or answers[attempt], dtype)

    assert attempts(True) and asked == [0]
    assert not attempts(False, False) and len(asked) == (1 if dtype == torch.float32 else 2)
    assert attempts(False, True, True) == (dtype == torch.bfloat16)
    assert not attempts(False, True, False)


def test_trying_leaves_windows_as_they_are():
    model = families.build("mistral")
    cached = CachedModel(model)
    assert cached.windows == {"sliding_attention": WINDOW} and model.config.sliding_window == WINDOW


@pytest.mark.parametrize(
    "name, longest, words",
    [
        ("phi3 longrope", WINDOW + 1, f"right only up to {WINDOW} .*: set max_length={WINDOW}$"),
        (
            "gpt2 of 48 positions",
            60,
            "right only up to 48 .*position 59 of a table of 48.*set max_length=48$",
        ),
        ("bert not causal", 20, "change with the tokens that follow.*take another model"),
        ("reformer", 20, "AssertionError.*take another model"),
    ],
)
def test_batches_that_training_would_get_wrong_are_refused(name, longest, words):
    with pytest.raises(ValueError, match=words):
        try_batches(families.build(name), longest)


@pytest.mark.parametrize("is_training", (False, True))
@pytest.mark.parametrize("name", ("phi3 longrope", "gpt2"))
def test_batches_that_are_right_leave_no_gradient(name, is_training):
    """GPT-2 has dropout in training mode."""
    model = families.build(name).train(is_training)
    try_batches(model, WINDOW)
    assert all(p.grad is None for p in model.parameters()) and model.training == is_training


class Detached(torch.nn.Linear):
    """A layer that backpropagation does not go through, as routers of experts have."""

    def forward(self, x):
        return super().forward(x.detach())


def test_derivatives_that_are_not_those_of_backpropagation_are_refused():
    model = families.build("llama")
    g = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    assert make_checked(model, g.__getitem__)
    model = families.build("llama")
    model.model.layers[0].mlp.down_proj.__class__ = Detached
    with pytest.raises(ValueError, match="not the derivative that backpropagation gives: set eps above 0"):
        make_checked(model, g.__getitem__)


def test_trying_derivatives_keeps_gradients_and_what_is_trained():
    model = families.build("llama")
    first, *others = model.parameters()
    first.grad, others[0].requires_grad = torch.ones_like(first), False
    value = reverse(model, lambda name: torch.ones(()), torch.tensor([[3, 4, 5]]))[2]
    assert value.isfinite() and value != 0
    assert first.grad.eq(1).all() and not others[0].requires_grad and others[1].grad is None


@pytest.mark.parametrize(
    "look_up",
    [
        lambda table, ids: torch.nn.functional.embedding(ids, table),
        lambda table, ids: table[ids],
        lambda table, ids: table.index_select(0, ids),
        lambda table, ids: table.gather(0, ids[:, None].expand(-1, 2)),
    ],
)
def test_an_index_beyond_a_table_is_found_before_a_gpu_would(look_up):
    with CheckedLookups():
        assert look_up(torch.zeros(4, 2), torch.tensor([0, 3])).shape == (2, 2)
        with pytest.raises(IndexError, match="position 4 of a table of 4"):
            look_up(torch.zeros(4, 2), torch.tensor([0, 4]))
