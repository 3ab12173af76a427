"""From the problems of a split to rows with prompts that a model can be sampled on."""

from dataclasses import dataclass
from typing import Any

from ads import chat
from ads.data import grading
from ads.data.problems import load_problems
from ads.data.published import read_published
from ads.data.tables import check_traces, read_parquet
from ads.stage.errors import UserError
from ads.stage.settings import GenConfig
from ads.stage.world import print0


@dataclass(eq=False)
class Row:
    """A problem on its way to a row of the table: first with its prompt, then with what was sampled."""

    problem: dict[str, Any]  # id, problem, solution and the dataset's other columns
    prompt_ids: list[int]  # what the model reads; they end in the opening
    opening: list[int]  # what the response is made to begin with: graded, but not sampled
    published: str | None = None  # a trace made elsewhere
    sampled: dict[str, Any] | None = None  # the columns of its completion and their grades (traces.grade)

    @property
    def id(self) -> str:
        return self.problem["id"]


def make_rows(cfg: GenConfig, tokenizer: Any) -> tuple[list[Row], dict[str, int]]:
    """The rows of a split in the order of its problems, and how many problems were left out for what."""
    found = load_problems(cfg.data_split, cfg.data_dir, cfg.max_samples, cfg.seed)
    if cfg.defence == "external":
        found = read_published(cfg.published or "", cfg.data_split.rpartition("_")[2], found)
    problems = leave_out_unanswered(found)
    examples, opening = few_shot_examples(cfg), opening_ids(cfg, tokenizer)
    rows = [
        Row(
            p, chat.prompt_ids(tokenizer, p["problem"], examples) + opening, opening, p.pop("published", None)
        )
        for p in problems
    ]
    kept = leave_out_long(cfg, rows)
    return kept, {
        "num_without_answer": len(found) - len(problems),
        "num_prompts_too_long": len(problems) - len(kept),
    }


def leave_out_unanswered(problems: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The problems that have an answer to grade against: their own solution, graded as a response, is right.

    2 of MATH's 7,500 solutions end in an empty box; a line of prose may not say which number is the answer.
    """
    kept, reasons = [], {}
    for problem in problems:
        try:
            grading.check_solution(problem["solution"])
            kept.append(problem)
        except ValueError as error:
            reasons[problem["id"]] = error
    if reasons:
        problem_id, reason = next(iter(reasons.items()))
        summary = f"{len(reasons)} of {len(problems)} problems have no answer, such as {problem_id}: {reason}"
        if not kept:
            raise UserError(summary)
        print0(f"left out: {summary}")
    return kept


def leave_out_long(cfg: GenConfig, rows: list[Row]) -> list[Row]:
    """The rows whose prompt is not too long and leaves room to respond; UserError if there are none."""
    longest = min(cfg.max_prompt_length, cfg.max_length - 1)
    kept = [row for row in rows if len(row.prompt_ids) <= longest]
    if not kept:
        shortest = min(len(row.prompt_ids) for row in rows)
        raise UserError(
            f"max_prompt_length={cfg.max_prompt_length}, max_length={cfg.max_length}: every prompt of "
            f"{cfg.data_split} is too long, the shortest has {shortest} tokens"
        )
    if num_left_out := len(rows) - len(kept):
        print0(f"left out {num_left_out} of {len(rows)} problems: prompts above {longest} tokens")
    return kept


def opening_ids(cfg: GenConfig, tokenizer: Any) -> list[int]:
    """The ids of what each response is made to begin with."""
    ids = chat.encode_next(tokenizer, cfg.prefill or "")
    if tokenizer.eos_token_id in ids:
        raise UserError(f"prefill={cfg.prefill!r}: holds the token that ends a response; leave it out")
    return ids


def few_shot_examples(cfg: GenConfig) -> list[tuple[str, str]]:
    """(problem, worked solution) of the first correct, finished traces: what follows their think block."""
    if not cfg.few_shot or cfg.few_shot_traces is None:
        return []
    rows = read_parquet(cfg.few_shot_traces)
    texts, flags = ("problem", cfg.trace_colname), ("finished", "is_raw_correct")
    check_traces(cfg.few_shot_traces, rows, text=texts, flags=flags)
    rows = [row for row in rows if row["finished"] and row["is_raw_correct"]]
    if len(rows) < cfg.few_shot:
        raise UserError(
            f"few_shot={cfg.few_shot}: {cfg.few_shot_traces} has {len(rows)} correct, finished traces"
        )
    return [(r["problem"], r[cfg.trace_colname].split("</think>")[-1].strip()) for r in rows[: cfg.few_shot]]
