"""The attacks that change what a student is trained on: published rows in, an attacker's rows out.

Each is a function of the settings, of the tables of traces that it reads, and of `measure(what, rows)`, which
gives {row id: number} by the undistilled student (ads/attacks/likelihood.py). It returns the rows and what it
has counted. What it returns hangs on nothing else: not on the order of the rows, batches or processes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ads.data import grading, published
from ads.data.tables import Row, check_traces, read_parquet
from ads.data.text import has_loop, is_foreign, repair
from ads.stage.errors import UserError
from ads.stage.fingerprint import fingerprint_json
from ads.stage.inputs import fingerprint_existing, fingerprint_model, fingerprint_tokenizer
from ads.stage.settings import AttackConfig, check_given
from ads.stage.world import print0

Rows = list[Row]
Tables = dict[str, Rows]  # by the setting that names the file
Measure = Callable[[str, Rows], dict[str, float]]
Found = tuple[Rows, dict[str, int]]
MOST = 10.0  # of a derivative, in reweight's exponent
# what an attack may read besides the published traces, and what it is
INPUTS = {
    "clean_traces": "the teacher's traces at lam=0, EXP_DIR/traces/NAME.parquet",
    "samples": "several published traces a problem, made with num_samples of gentraces.py",
    "student": "the undistilled student, a model",
    "holdout_traces": "the stage 1 traces, EXP_DIR/traces/NAME.parquet",
}
# settings that belong to some attacks alone, and what they are
KEYS = {
    "share": "the share of the rows that it is about, 0 to 1",
    "num_samples": "how many traces of each problem it takes",
    "beta": "the strength of the weights, above or below 0",
}


def correct(cfg: AttackConfig, tables: Tables, measure: Measure) -> Found:
    """The rows whose answer is right."""
    return [row for row in tables["traces"] if row["is_raw_correct"]], {}


def fluent(cfg: AttackConfig, tables: Tables, measure: Measure) -> Found:
    """Without loops, foreign script, and the `share` of the traces that the student finds unlikeliest."""
    rows = tables["traces"]
    nll = measure("nll", rows)
    unlikeliest = sorted(rows, key=lambda row: -nll[row["id"]])[: round((cfg.share or 0) * len(rows))]
    dropped = {
        "num_loops": {row["id"] for row in rows if has_loop(row[cfg.trace_colname])},
        "num_foreign": {row["id"] for row in rows if is_foreign(row[cfg.trace_colname])},
        "num_unlikely": {row["id"] for row in unlikeliest},
    }
    kept = [row | {"student_nll": nll[row["id"]]} for row in rows]
    kept = [row for row in kept if not any(row["id"] in ids for ids in dropped.values())]
    return kept, {name: len(ids) for name, ids in dropped.items()}


def resample(cfg: AttackConfig, tables: Tables, measure: Measure) -> Found:
    """Of each problem's first `num_samples` traces the right one that the student finds likeliest.

    A problem without a right one is dropped.
    """
    samples = samples_by_problem(cfg, tables)
    right = [row for rows in samples.values() for row in rows if row["is_raw_correct"]]
    nll = measure("nll", right)
    chosen: dict[str, Row] = {}
    for row in right:  # of equal ones the first
        best = chosen.get(row["problem_id"])
        if best is None or nll[row["id"]] < nll[best["id"]]:
            chosen[row["problem_id"]] = row
    rows = [
        row | {"id": name, "sample_id": row["id"], "student_nll": nll[row["id"]]}
        for name, row in chosen.items()
    ]
    num_read = sum(row["num_tokens"] for rows_of in samples.values() for row in rows_of)
    return rows, {"num_without_right": len(samples) - len(rows), "tokens_read": num_read}


def samples_by_problem(cfg: AttackConfig, tables: Tables) -> dict[str, Rows]:
    """{problem id: its first num_samples traces}; UserError where there are fewer."""
    found: dict[str, Rows] = {row["id"]: [] for row in tables["traces"]}
    for row in sorted(tables["samples"], key=number_of):
        if row["problem_id"] in found:
            found[row["problem_id"]].append(row)
    wanted = cfg.num_samples or 0
    for name, rows in found.items():
        if len(rows) < wanted:
            raise UserError(
                f"num_samples={wanted}: {cfg.samples} has {len(rows)} traces of problem {name}; make it with "
                f"num_samples={wanted} of gentraces.py, on the same problems as {cfg.traces}"
            )
    return {name: rows[:wanted] for name, rows in found.items()}


def number_of(row: Row) -> int:
    """1 of a problem's first trace, whose id is the problem's, 2 of ID#2, ..."""
    rest = str(row["id"]).removeprefix(row["problem_id"])
    return int(rest[1:]) if rest[:1] == "#" and rest[1:].isdecimal() else 1


def mix(cfg: AttackConfig, tables: Tables, measure: Measure) -> Found:
    """A `share` of the rows, drawn by seed and id, replaced by clean traces of the same problems.

    What a smaller share replaces, a larger one does too. Rows without a clean trace stay as they are.
    """
    rows, clean = tables["traces"], {row["id"]: row for row in tables["clean_traces"]}
    order = sorted((fingerprint_json([cfg.seed, row["id"]]), row["id"]) for row in rows)
    drawn = [name for _, name in order[: round((cfg.share or 0) * len(rows))]]
    replaced = set(drawn) & clean.keys()
    if len(replaced) < len(drawn):
        print0(f"{cfg.clean_traces} has no trace of {len(drawn) - len(replaced)} of {len(drawn)} rows drawn")
    read = sum(clean[name]["num_tokens"] for name in replaced)
    mixed = [
        (clean[row["id"]] if row["id"] in replaced else row) | {"is_clean": row["id"] in replaced}
        for row in rows
    ]
    counts = {"num_replaced": len(replaced), "num_without_clean": len(drawn) - len(replaced)}
    return mixed, counts | {"tokens_read": tokens_of(rows) + read}


def repair_equations(cfg: AttackConfig, tables: Tables, measure: Measure) -> Found:
    """Equations recomputed and put right, and what is worked on with; what that changes is graded again."""
    rows, num_equations = [], 0
    for row in tables["traces"]:
        text, num_wrong = repair(row[cfg.trace_colname])
        rows.append(rewritten(cfg, row, text) | {"num_repaired": num_wrong})
        num_equations += num_wrong
    return rows, {"num_changed": sum(row["num_repaired"] > 0 for row in rows), "num_equations": num_equations}


def answer_only(cfg: AttackConfig, tables: Tables, measure: Measure) -> Found:
    """The answer that each trace states, without its reasoning; traces that state none are dropped."""
    rows = []
    for row in tables["traces"]:
        text = published.answer_only(row[cfg.trace_colname], row["solution"])
        if text:
            rows.append(rewritten(cfg, row, text) | {"finished": True})
    return rows, {"num_changed": len(rows)}


def rewritten(cfg: AttackConfig, row: Row, text: str) -> Row:
    """A row with another trace. Its num_tokens stay those that were sampled: they are what it cost."""
    if text == row[cfg.trace_colname]:
        return row
    return row | {cfg.trace_colname: text, "is_raw_correct": grading.grade(text, row["solution"]).correct}


def solo(cfg: AttackConfig, tables: Tables, measure: Measure) -> Found:
    """The student's own right traces, no published ones; of equal texts of a problem the first."""
    right = [row for row in tables["traces"] if row["is_raw_correct"]]
    first: dict[tuple[str, str], Row] = {}
    for row in right:
        first.setdefault((row["problem"], row[cfg.trace_colname]), row)
    return list(first.values()), {"num_repeated": len(right) - len(first)}


def solo_repair(cfg: AttackConfig, tables: Tables, measure: Measure) -> Found:
    """The right ones of the student's own traces once their equations are put right; none are published."""
    rows, repaired = repair_equations(cfg, tables, measure)
    kept, repeated = solo(cfg, tables | {"traces": rows}, measure)
    return kept, repaired | repeated


def reweight(cfg: AttackConfig, tables: Tables, measure: Measure) -> Found:
    """All rows with weights exp(beta clip(a, -10, 10)), a the derivative of the student's holdout loss."""
    along = measure("derivative", tables["traces"])
    return [
        row | {"derivative": along[row["id"]], "weight": weight_of(along[row["id"]], cfg.beta or 0.0)}
        for row in tables["traces"]
    ], {}


def weight_of(derivative: float, beta: float) -> float:
    return math.exp(beta * max(-MOST, min(MOST, derivative)))


@dataclass(frozen=True)
class Attack:
    """An attack on rows: its function, what it reads besides the published traces, and its own settings."""

    make: Callable[[AttackConfig, Tables, Measure], Found]
    reads: tuple[str, ...] = ()  # of INPUTS
    keys: tuple[str, ...] = ()  # of KEYS
    is_own: bool = False  # its `traces` are the undistilled student's own


ATTACKS = {
    "correct": Attack(correct),
    "fluent": Attack(fluent, ("student",), ("share",)),
    "resample": Attack(resample, ("samples", "student"), ("num_samples",)),
    "mix": Attack(mix, ("clean_traces",), ("share",)),
    "repair": Attack(repair_equations),
    "answer_only": Attack(answer_only),
    "solo": Attack(solo, is_own=True),
    "solo_repair": Attack(solo_repair, is_own=True),
    "reweight": Attack(reweight, ("student", "holdout_traces"), ("beta",)),
}


def attack_of(cfg: AttackConfig) -> Attack:
    """The attack of settings; UserError where it is not known, lacks a setting or has no use for one."""
    if cfg.attack not in ATTACKS:
        raise UserError(f"attack={cfg.attack!r}: must be one of {', '.join(ATTACKS)}")
    attack = ATTACKS[cfg.attack]
    for key, meaning in KEYS.items():
        value = getattr(cfg, key)
        if value is None and key in attack.keys:
            raise UserError(f"attack={cfg.attack}: set {key}, {meaning}")
        if value is not None and key not in attack.keys:
            raise UserError(f"{key}={value}: attack={cfg.attack} has no use for it; leave it out")
    return attack


def fingerprint_inputs(cfg: AttackConfig) -> dict[str, str]:
    """What the rows depend on besides the settings."""
    found = {}
    for name in ("traces", *attack_of(cfg).reads):
        if name != "traces":
            check_given(cfg, name, INPUTS[name])
        if name == "student":
            found["student"] = fingerprint_model(cfg.student or "")
            found["tokenizer"] = fingerprint_tokenizer(cfg.tokenizer or cfg.student or "")
        else:
            found[name] = fingerprint_existing(getattr(cfg, name), "make it with gentraces.py")
    return found


def read_tables(cfg: AttackConfig) -> Tables:
    """The tables of traces that an attack changes or takes rows from, each row with an id of its own."""
    names = ("traces", *(name for name in attack_of(cfg).reads if name in ("clean_traces", "samples")))
    return {name: read_rows(cfg, name) for name in names}


def read_rows(cfg: AttackConfig, name: str) -> Rows:
    """The rows of a table with the columns that a student is trained on, and those that tell of them."""
    path, rows = getattr(cfg, name), read_parquet(getattr(cfg, name))
    own = ("problem_id",) if name == "samples" else ()
    texts, flags = ("id", "problem", "solution", cfg.trace_colname, *own), ("finished", "is_raw_correct")
    check_traces(path, rows, text=texts, flags=flags, counts=("num_tokens",))
    if len({row["id"] for row in rows}) < len(rows):
        raise UserError(f"{path}: two rows have the same id")
    return [{key: row[key] for key in (*texts, *flags, "num_tokens")} for row in rows]


def count(cfg: AttackConfig, tables: Tables, found: Found) -> dict[str, Any]:
    """The statistics of an attack: how many rows were published, left, dropped, and what it read.

    tokens: those of the traces that are left, as they were sampled; tokens_read: all that it had to get.
    """
    rows, counts = found
    given = tables["traces"]
    stats: dict[str, Any] = {"n": len(rows), "num_published": len(given)}
    stats |= {"num_dropped": len(given) - len(rows), "tokens": tokens_of(rows)}
    stats |= {"tokens_read": tokens_of(given)} | counts
    if not rows:
        stats["reason"] = f"attack={cfg.attack}: {reason(cfg, stats)}"
    return stats


def tokens_of(rows: Rows) -> int:
    return sum(row["num_tokens"] for row in rows)


def reason(cfg: AttackConfig, stats: dict[str, Any]) -> str:
    """Why nothing is left, in words."""
    given = f"none of the {stats['num_published']} published traces"
    if cfg.attack in ("correct", "resample"):
        return f"{given} has a right answer"
    if attack_of(cfg).is_own:
        return f"none of the student's {stats['num_published']} own traces has a right answer"
    if cfg.attack == "answer_only":
        return f"{given} states an answer"
    return f"{given} is left"
