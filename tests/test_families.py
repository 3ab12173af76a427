"""Every family of causal language models that the library has, through what this project does with models.

    python tests/test_families.py [FAMILY ...]      # writes docs/families.md

A cell is "equal", or the one line by which the project refuses. Nothing else may be: a wrong result without a
word, or a traceback.
"""

import contextlib
import io
import sys
import tempfile
import traceback
from collections import Counter

import families
import pytest
import torch
import transformers
from conftest import ROOT, byte_tokenizer, save_folder
from families import VOCABULARY, WINDOW

from ads.stage.errors import UserError

DOCUMENT = ROOT / "docs" / "families.md"
ALL = torch.ones(VOCABULARY, dtype=torch.bool)
# Prompts below and beyond WINDOW, one that comes to it, and several lengths in one batch.
LENGTHS = WINDOW - 5, 9, WINDOW + 20
NUM_NEW = 10
TOLERANCE = 1e-3

HEAD = """# Families of language models

[Start page](README.md). You learn here which families of models can be decoded, differentiated and
distilled here, and why the others are refused.

*equal*: the same to rounding. *refused*: an error, before anything is sampled or trained. Its number leads to
the message ([Lines](#lines); TYPE is the family), which says what to do: set `eps` above 0, set `lora=false`,
lower `max_length`, or take another model. *not buildable*: the library makes no small model of it.

Each family of causal language models in transformers {version}, and some variants, was tested as a tiny
random model with attention windows of {window} tokens, in float32 on a CPU, on sequences of 9 to 70 tokens:

| column | what is tested | against |
|---|---|---|
| decode | greedy decoding with a cache, in batches of unequal lengths | passes without, over one sequence |
| exact Delta | with a cache, in batches | the central difference in float64, over one sequence |
| gradient | the gradient of padded batches | backpropagation of one sequence after another |
| LoRA and merge | the student that `distill.py` saves | the student that it trained |

`python tests/test_families.py` writes this page; the tests of that file check it.
"""


class Different(Exception):
    """A result that is not what plain torch gives."""


def prompts(lengths=LENGTHS):
    """Rows of ids, none of which is a padding token."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 250, (n,), generator=generator).tolist() for n in lengths]


def load(folder):
    from ads.loading import load_model

    return load_model(folder, "float32", "cpu")


@torch.no_grad()
def plain_logits(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]


def check(found, wanted, what, tolerance=TOLERANCE):
    error = ((found - wanted).norm() / wanted.norm()).item()
    if not error <= tolerance:
        raise Different(f"{what}: relative error {error:.1e}")


def decode(folder):
    """Greedy decoding of a batch of unequal rows against passes over one row without a cache."""
    from ads.decode.cached_model import CachedModel
    from ads.decode.engine import Models, generate
    from ads.decode.rows import Request
    from ads.sampling import GREEDY

    model, plain = load(folder), load(folder)
    models = Models(CachedModel(model), None, ALL, frozenset({VOCABULARY - 1}))
    rows = [Request(str(i), ids, NUM_NEW) for i, ids in enumerate(prompts())]
    found = {c.id: c for c in generate(models, GREEDY, 1, rows, 2)}
    for row in rows:
        ids, log_prob = list(row.prompt_ids), 0.0
        for token in found[row.id].ids:
            logits_V = plain_logits(plain, ids)[:VOCABULARY]
            if token != logits_V.argmax() and logits_V.max() - logits_V[token] > 1e-3:
                raise Different(f"row {row.id}: token {len(ids)} is not the likeliest")
            log_prob += torch.log_softmax(logits_V.float(), -1)[token].item()
            ids.append(token)
        if abs(log_prob - found[row.id].log_prob) > 1e-2:
            raise Different(f"row {row.id}: log p {found[row.id].log_prob:.4f} for {log_prob:.4f}")


def exact_delta(folder):
    """Delta of cached, batched dual numbers against the central difference of float64 passes over one row."""
    from ads.delta.exact import ExactDerivative

    model, (plain, eps) = load(folder), float64(load(folder))
    generator = torch.Generator().manual_seed(2)
    g = {
        n: torch.randn(p.shape, generator=generator) * p.std(correction=0)
        for n, p in model.named_parameters()
    }
    norm = torch.stack([x.norm() for x in g.values()]).norm()
    g = {name: x / norm for name, x in g.items()}
    exact = ExactDerivative(model, g.__getitem__, ALL)
    rows, longest = prompts(), max(LENGTHS) + 4
    exact.try_length(longest)
    exact.allocate(3, longest)
    delta_BV = exact.prefill(rows, 0)
    for token in (7, 11, 13):
        tokens, lengths = torch.full((3,), token), torch.tensor([len(ids) for ids in rows])
        delta_BV = exact.step(tokens, lengths, int(lengths.max()))
        rows = [[*ids, token] for ids in rows]
    for ids, delta_V in zip(rows, delta_BV, strict=True):
        check(delta_V.double(), central(plain, g, ids, eps), f"Delta after {len(ids)} tokens", 0.02)


def float64(model):
    """(model, eps): in float64 where the family can be run in it, and a step that rounding allows."""
    try:
        plain_logits(model.double(), prompts()[0])
    except RuntimeError:
        return model.float(), 1e-2
    return model, 1e-3


@torch.no_grad()
def central(model, g, ids, eps):
    """Delta (V,) as in the paper's eq. 10."""
    log_probs = []
    for step in (eps, -2 * eps):
        for name, p in model.named_parameters():
            p += step * g[name]
        log_probs.append(torch.log_softmax(plain_logits(model, ids)[:VOCABULARY], -1))
    for name, p in model.named_parameters():
        p += eps * g[name]
    return (log_probs[0] - log_probs[1]) / (2 * eps)


def gradient(folder):
    """The mean gradient of padded batches against backpropagation of one row after another."""
    from ads.delta import gradient
    from ads.delta.loss import make_sequences
    from ads.trials import try_batches

    lengths = WINDOW + 1, WINDOW, WINDOW - 1, 12
    rows = [{"prompt_ids": ids[:6], "response_ids": ids[6:]} for ids in prompts(lengths)]
    model, plain = load(folder), load(folder)
    sequences = make_sequences(rows, 4096)
    try_batches(model, max(lengths))  # as save_grad.py does
    gradient.add_gradient_(model, sequences, len(rows), 4)
    for s in sequences:
        ids = torch.tensor([s.ids])
        logits = plain(input_ids=ids, use_cache=False).logits[0, s.num_prompt_tokens - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, s.num_prompt_tokens :])
        (loss / len(sequences)).backward()
    check(*(flat([p.grad for p in m.parameters()]) for m in (model, plain)), "gradient")


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors if t is not None])


def lora(folder):
    """Two steps of distill.py's training: the student as saved against the one that was trained."""
    from ads import chat
    from ads.attacks import training
    from ads.stage.settings import TrainConfig
    from ads.stage.world import World
    from ads.trials import try_batches

    cfg = TrainConfig(
        exp_dir=folder,
        student=folder,
        do_eval=False,
        lora_r=4,
        lora_alpha=16,
        lr=0.02,
        num_epochs=1,
        batch_size=2,
    )
    tokenizer = chat.load_tokenizer_for(cfg.student, cfg.tokenizer)
    model = training.load_student(cfg, tokenizer, "cpu")
    tried = prompts((24, 17, 20, 11))
    try_batches(model, 24)  # as distil() does
    before = plain_logits(model, tried[0])
    examples = [{"input_ids": ids, "labels": ids} for ids in tried]
    world = World(rank=0, size=1, device="cpu")
    trainer = training.make_trainer(cfg, model, tokenizer, examples, None, 2, world)
    training.train_fast(trainer)
    model = trainer.model.eval()
    wanted = [plain_logits(model, ids) for ids in tried]
    if torch.allclose(before, wanted[0], atol=1e-3):
        raise Different("training changed nothing")
    training.save_student(cfg, model, tokenizer, "cpu", tried)
    merged = load(str(cfg.model_path / "final"))
    for ids, logits_V in zip(tried, wanted, strict=True):
        check(plain_logits(merged, ids), logits_V, f"merged, {len(ids)} tokens")


COLUMNS = {"decode": decode, "exact Delta": exact_delta, "gradient": gradient, "LoRA and merge": lora}


def verdict(column, folder):
    """What a cell of the table says."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            COLUMNS[column](folder)
    except Different as error:
        return f"DIFFERENT: {error}"
    except Exception as error:
        if isinstance(error, UserError):
            return f"refused: {str(error).replace(folder, 'FOLDER')}"
        raised_at = traceback.extract_tb(error.__traceback__)[-1]
        return f"TRACEBACK: {type(error).__name__}: {' '.join(str(error).split())[:300]} ({raised_at.name})"
    return "equal"


def verdicts(name):
    """{column: verdict} of a family."""
    try:
        model = families.build(name)
    except families.NotBuildable as error:
        return dict.fromkeys(COLUMNS, f"not buildable: {error}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_folder(folder, model, byte_tokenizer())
        except Exception as error:  # whatever the library raises
            return dict.fromkeys(COLUMNS, f"not buildable: not saved, {type(error).__name__}: {error}")
        return {column: verdict(column, folder) for column in COLUMNS}


def document(table):
    """The text of docs/families.md, of {family: {column: verdict}}."""
    numbers, counts = {}, {column: Counter() for column in COLUMNS}
    rows = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, cells in table.items():
        shown = []
        for column, text in cells.items():
            kind, _, reason = text.partition(": ")
            counts[column][kind] += 1
            line = reason.replace(f"{name.split(' ')[0]!r}", "'TYPE'")
            number = numbers.setdefault(line, len(numbers) + 1) if reason else ""
            shown.append(f"{kind} {number}".strip())
        rows.append(f"| {name} | {' | '.join(shown)} |")
    kinds = ["equal", "refused", "not buildable", "DIFFERENT", "TRACEBACK"]
    sums = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    sums += [f"| {kind} | {' | '.join(str(counts[c][kind]) for c in COLUMNS)} |" for kind in kinds]
    lines = [f"{number}. {line}" for line, number in numbers.items()]
    parts = [
        HEAD.format(version=transformers.__version__, window=WINDOW),
        *sums,
        "",
        *rows,
        "",
        "## Lines",
        "",
        *lines,
    ]
    return "\n".join(parts) + "\n"


def documented():
    """{family: [kind of each cell]} of docs/families.md; empty where it was made with another library."""
    text = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    if f"transformers {transformers.__version__}" not in text:
        return {}
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: [cell.rstrip(" 0123456789") for cell in cells] for name, *cells in rows}


def check_family(name):
    found = verdicts(name)
    kinds = [text.partition(": ")[0] for text in found.values()]
    assert not {"DIFFERENT", "TRACEBACK"} & set(kinds), found
    return kinds


@pytest.mark.parametrize("name", families.QUICK)
def test_what_is_not_equal_is_refused_in_one_line(name):
    """Angles, windows, caches and derivatives of these were wrong without a word, or ended in a traceback."""
    if families.kind_of(name) not in families.kinds():
        pytest.skip(f"this version of transformers has no {name}")
    kinds = check_family(name)
    assert not documented() or kinds == documented()[name], "python tests/test_families.py writes it anew"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in families.families() if name not in families.QUICK])
def test_every_other_family(name):
    """As docs/families.md says, where that was made with the same version of the library."""
    kinds = check_family(name)
    assert not documented() or kinds == documented()[name], "python tests/test_families.py writes it anew"


def main(names):
    torch.set_num_threads(1)
    table = {}
    for name in names or families.families():
        table[name] = verdicts(name)
        for column, text in table[name].items():
            print(f"{name} | {column} | {text}", flush=True)
    if not names:
        DOCUMENT.write_text(document(table), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
