"""Find the lam and tau at which arms cost the teacher the same: equal accuracy, or equal NLL per token.

    python search.py exp_dir=runs/x targets=0.9,0.8,0.7 -- proxy_student=Qwen/Qwen2.5-3B \\
        grad_path=runs/x/student_grads.safetensors
    python search.py exp_dir=runs/x match=nll targets=0.5 arms="poe,poe max_kl=0.1" -- proxy_student=...
    python grid.py --file runs/x/matched.txt

Settings: search_config.yaml, then key=value; the words after -- go to gentraces.py as they are. Each
evaluation is a stage of gentraces.py in EXP_DIR/search: one that is done is not run again. Exit code 1: some
target was not hit; the points of the others are in EXP_DIR/matched.txt all the same.

A hit on n problems has a standard error (0.026 of an accuracy of 0.7 on 300), and the nearest of several
tries is near by chance too. So each point is measured again on other problems of the split, as many as there
are up to max_samples: that value is the one to report.
"""

import functools
import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import utils
from ads.arms import BY_NAME
from ads.data.problems import load_problems, take_subset
from ads.data.tables import read_parquet
from ads.data.traces import fingerprint_inputs
from ads.defences import matching
from ads.stage import files, hub, layout
from ads.stage.config import SWEPT, ignored_keys, load_config, make_config, to_dict
from ads.stage.errors import UserError
from ads.stage.settings import GenConfig, SearchConfig
from ads.stage.sidecar import is_finished, read_sidecar
from ads.stage.world import print0, world_size
from utils import ROOT, print_result

# where lam_start and lam_max are null
DELTA_START, PROXY_START, MOST_STARTS = 0.01, 0.1, 128
SET_BY_SEARCH = ("exp_dir", "trace_name", "data_split", "max_samples", "tau", "lam", "defence")
OF_AN_ARM = ("max_kl", "keep_top1", "plausibility", "direction_seed")  # the grid's line has to tell them

NOT_AGAIN = "not measured again on other problems"
OFF = "OFF the target by more than the tolerance and two standard errors; search on more (max_samples)"

REMEDIES = {
    matching.TOO_HIGH: "choose a lower target or a lower tau",
    matching.TOO_FAR: "raise lam_max or tau_max, or choose a target nearer to the value at lam 0",
    matching.UNFINISHED: "raise max_evaluations (what was measured is kept), or change where it starts",
}


@dataclass(frozen=True)
class Trial:
    """Settings of one evaluation, as they will stand in the grid; is_fresh: on other problems."""

    tau: str
    lam: str
    defence: str
    words: tuple[str, ...] = ()
    is_fresh: bool = False

    @property
    def name(self):
        defence = [] if self.defence == "ads" else [self.defence]
        fresh = ["fresh"] if self.is_fresh else []
        return "_".join([f"search_tau{self.tau}_lam{self.lam}", *defence, *self.words, *fresh])


def main(arguments):
    utils.show_help(arguments, "search_config.yaml")
    cfg, words = parse(arguments)
    hub.read_commits(stages_dir(cfg))
    check_stages(cfg, words)
    others = other_problems(cfg, words)
    utils.prepare_exp_dir(cfg.exp_dir)
    hub.record_commits(stages_dir(cfg))
    with files.stage_lock(cfg.exp_dir, f"search-{cfg.output}"):
        if not others:
            print0(f"{NOT_AGAIN}: max_samples={cfg.max_samples} leaves no two of {cfg.data_split}")
        results = [found for arm in cfg.arm_names for found in search_arm(arm, cfg, words)]
        if others:
            write_problems(others, cfg)
            results = [measure_again(found, cfg, words) for found in results]
        lines = [line for found in results for line in grid_lines(found, cfg, words)]
        header = [f"# {shlex.join(['search.py', *arguments])}", "# tau lam eps [key=value ...]"]
        files.write_text(cfg.output_path, "\n".join([*header, *lines, ""]))
    print0(*lines, sep="\n")
    print_result(output=str(cfg.output_path), matches=[describe(found, cfg) for found in results])
    if any(found.outcome in REMEDIES for found in results):
        sys.exit(1)


def parse(arguments):
    """(SearchConfig, the words for gentraces.py)."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    cfg = load_config(SearchConfig, ROOT / "search_config.yaml", arguments[:split])
    words = arguments[split + 1 :]
    for word in words:
        if (key := word.removeprefix("--").partition("=")[0]) in SET_BY_SEARCH:
            raise UserError(f"{word!r} after --: the search sets {key}; its own settings stand before --")
        if key in OF_AN_ARM:
            raise UserError(f"{word!r} after --: it is part of an arm, such as arms='poe {key}=...'")
    for key in (word.partition("=")[0] for arm in cfg.arm_names for word in arm.split()[1:]):
        if key not in SWEPT or key in SET_BY_SEARCH:
            raise UserError(f"arms={cfg.arms!r}: {key} is no key of gentraces.py that an arm may set")
    return cfg, words


def check_stages(cfg, words):
    """What would fail at the first stage, or at the last, fails here."""
    if world_size() > 1:
        raise UserError("search.py is one process: give the launcher as launch='...', it starts gentraces.py")
    if shutil.which(launcher(cfg)[0]) is None:
        raise UserError(f"launch={cfg.launch!r}: there is no command {launcher(cfg)[0]!r}")
    for arm in cfg.arm_names:
        stage = stage_config(make_trial(arm, limits_of(arm, cfg, words).start, cfg), cfg, words)
        if cfg.match == "accuracy" and cfg.rule == "af" and not stage.answer_force:
            raise UserError("rule=af: needs answer_force=true, or choose rule=raw")
        fingerprint_inputs(stage)


def search_arm(arm, cfg, words):
    """What was Found for each target, highest first."""
    measured, limits = {}, limits_of(arm, cfg, words)
    print0(f"{arm}: starts at {limits.start:g}, and ends at {limits.most:g}")
    evaluate = functools.partial(evaluate_stage, arm, cfg, words)
    return [matching.find_value(arm, target, limits, cfg, measured, evaluate) for target in cfg.target_values]


def limits_of(arm, cfg, words):
    """Where the search of an arm begins and ends, by the settings; by the arm where they leave that open."""
    row = BY_NAME[arm.split()[0]]
    if row.knob == "tau":
        return matching.Limits(cfg.tau, cfg.tau_start, cfg.tau_max)
    start = cfg.lam_start or start_of(row, stage_config(Trial("0", "0", "ads"), cfg, words).grad_path)
    most = cfg.lam_max or MOST_STARTS * start
    return matching.Limits(0.0, min(start, most), most)


def start_of(row, grad_path):
    """The lam by which Delta moves log-probabilities by half a nat, if stage 2 measured that."""
    if "gradient" not in row.inputs:
        return PROXY_START
    sidecar = layout.sidecar_of(Path(grad_path)) if grad_path else None
    found = (sidecar and sidecar.is_file() and read_sidecar(sidecar).get("diagnostics")) or {}
    return found.get("lam_of_spread", {}).get("0.5", DELTA_START)


def make_trial(arm, x, cfg):
    """Without the arm's words that have no effect: where x is at its least this is one trial for all arms."""
    name, *words = arm.split()
    if BY_NAME[name].knob == "tau":
        trial = Trial(f"{x:.12g}", "0", "ads")
    else:
        trial = Trial(f"{cfg.tau:.12g}", f"{x:.12g}", BY_NAME[name].defence if x else "ads")
    pairs = dict(word.split("=", 1) for word in words)
    settings = {"tau": trial.tau, "lam": trial.lam, "defence": trial.defence, **pairs}
    idle = make_config(GenConfig, settings, dict.fromkeys(settings, "arms")).idle_keys
    return replace(trial, words=tuple(f"{key}={text}" for key, text in pairs.items() if key not in idle))


def evaluate_stage(arm, cfg, words, x, is_fresh=False):
    """What is matched at x, from the traces of its stage, which is run where it is not done."""
    trial = replace(make_trial(arm, x, cfg), is_fresh=is_fresh)
    stage = stage_config(trial, cfg, words)
    # where the folder of other problems lies is no matter: its contents are compared
    ignored = ignored_keys(stage) | ({"data_split"} if is_fresh else set())
    if not is_finished(stage.sidecar_path, to_dict(stage), fingerprint_inputs(stage), ignored):
        run_stage(trial, cfg, words)
    measured = measure(stage, cfg)
    print0(f"{trial.name}: {cfg.quantity} {measured}")
    return measured


def measure(stage, cfg):
    """What is Measured of the traces of a finished stage: a share of problems, or a mean over them."""
    stats = files.read_yaml(stage.sidecar_path)["stats"]
    n = stats["n"]
    if cfg.match == "accuracy":
        # with two right and two wrong ones more (Agresti and Coull): all right on 20 is not without an error
        share = (stats[cfg.rule]["num_correct"] / stage.num_samples + 2) / (n + 4)
        return matching.Measured(stats[cfg.rule]["accuracy"], math.sqrt(share * (1 - share) / (n + 4)), n)
    if n < 2:
        raise UserError(f"{stage.parquet_path} is of one problem: a standard error takes two, of max_samples")
    nlls = [row["teacher_nll"] for row in read_parquet(stage.parquet_path)]
    return matching.Measured(stats["teacher_nll"], statistics.stdev(nlls) / math.sqrt(n), n)


# Other problems than those that were searched on


def other_problems(cfg, words):
    """Problems of the split that the search does not look at, at most max_samples; [] where not two."""
    stage = stage_config(Trial("0", "0", "ads"), cfg, words)
    of_split = stage.data_split, stage.data_dir
    searched = {row["problem"] for row in load_problems(*of_split, stage.max_samples, stage.seed)}
    others = [row for row in load_problems(*of_split, None, stage.seed) if row["problem"] not in searched]
    return take_subset(others, cfg.max_samples, stage.seed) if len(others) > 1 else []


def write_problems(problems, cfg):
    """As a data set of one's own, which gentraces.py reads; searches of other outputs write the same."""
    rows = [{key: row[key] for key in ("id", "problem", "solution")} for row in problems]
    path = layout.path_of("fresh", stages_dir(cfg)) / f"{cfg.data_split.rpartition('_')[2]}.jsonl"
    with files.stage_lock(cfg.exp_dir, "search-fresh"):
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def measure_again(found, cfg, words):
    """With what other problems say of it, where it is a point of the grid."""
    if found.outcome in REMEDIES:
        return found
    return replace(found, again=evaluate_stage(found.arm, cfg, words, found.x, is_fresh=True))


# Stages of gentraces.py


def stage_config(trial, cfg, words):
    return load_config(GenConfig, ROOT / "gen_config.yaml", stage_words(trial, cfg, words))


def stages_dir(cfg):
    """A folder of their own: the report would take the evaluations for points of the experiment."""
    return layout.path_of("search", cfg.exp_dir)


def stage_words(trial, cfg, words):
    """The arguments of gentraces.py; the user's come first, as the first may name a YAML file."""
    max_samples = "null" if cfg.max_samples is None else cfg.max_samples
    of_others = f"{layout.path_of('fresh', stages_dir(cfg))}_{cfg.data_split.rpartition('_')[2]}"
    data_split = of_others if trial.is_fresh else cfg.data_split
    ours = (f"exp_dir={stages_dir(cfg)}", f"trace_name={trial.name}", f"data_split={data_split}")
    settings = (f"max_samples={max_samples}", f"tau={trial.tau}", f"lam={trial.lam}")
    return [*words, *ours, *settings, f"defence={trial.defence}", *trial.words]


def launcher(cfg):
    return cfg.launch.split() if cfg.launch else [sys.executable]


def run_stage(trial, cfg, words):
    """Run gentraces.py; exits with its exit code, by the shell's count, where that is not 0."""
    command = [*launcher(cfg), str(ROOT / "gentraces.py"), *stage_words(trial, cfg, words)]
    log = layout.path_of("log", stages_dir(cfg), trial.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    print0(f"run     {trial.name} ({time.strftime('%F %T')}, log {log}): {shlex.join(command)}")
    with log.open("a", encoding="utf-8") as file:
        output = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        status = wait_for(subprocess.Popen(command, **output))
    if status:
        status = status if status > 0 else 128 - status
        print(f"error: {trial.name} ended with exit code {status}: see {log}", file=sys.stderr, flush=True)
        sys.exit(status)


def wait_for(process):
    """The exit status of a process, which is stopped when this one is told to stop."""
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


# What was found


def grid_lines(found, cfg, words):
    """Lines of the output for one target: comments, and the grid's line where there is one."""
    trial = make_trial(found.arm, found.x, cfg)
    place = " ".join((f"tau {trial.tau} lam {trial.lam}", *trial.words))
    value = f"{cfg.quantity} {found.measured}"
    comment = f"# {found.arm}, target {found.target:g}: {found.outcome}"
    if found.outcome in REMEDIES:
        return [f"{comment} (best: {value} at {place}); {REMEDIES[found.outcome]}"]
    stage = stage_config(trial, cfg, words)
    eps = "0" if "eps" in stage.idle_keys else f"{stage.eps:g}"
    defence = [] if trial.defence == "ads" else [f"defence={trial.defence}"]
    line = " ".join([trial.tau, trial.lam, eps, *defence, *trial.words])
    return [f"{comment}, {value} on {cfg.data_split}", f"#   {tell_again(found, cfg)}", line]


def tell_again(found, cfg):
    """What other problems say of a point, in words."""
    if found.again is None:
        return NOT_AGAIN
    told = f"on other problems: {found.again}"
    return f"{told}, {OFF}" if matching.holds(found, cfg) is False else told


def describe(found, cfg):
    """What the result line says of one target: of a point, what it was on other problems."""
    trial = make_trial(found.arm, found.x, cfg)
    settings = {"arm": found.arm, "target": found.target, "tau": float(trial.tau), "lam": float(trial.lam)}
    reported = found.again or found.measured
    numbers = {cfg.match: reported.value, "standard_error": reported.standard_error, "n": reported.n}
    both = {"searched": vars(found.measured), "again": found.again and vars(found.again)}
    return {**settings, **numbers, **both, "outcome": found.outcome, "holds": matching.holds(found, cfg)}


if __name__ == "__main__":
    utils.run_script(main)
