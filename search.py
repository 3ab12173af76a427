"""Find the lam and tau at which the teacher's accuracy hits targets, to compare arms at equal utility.

    python search.py exp_dir=runs/x targets=0.9,0.8,0.7 -- proxy_student=Qwen/Qwen2.5-3B \\
        grad_path=runs/x/student_grads.safetensors
    python grid.py --file runs/x/matched.txt

Settings: search_config.yaml, then key=value; the words after -- go to gentraces.py as they are. Each
evaluation is a stage of gentraces.py in EXP_DIR/search: one that is done is not run again. Exit code 1: some
target was not hit; the points of the others are in EXP_DIR/matched.txt all the same.
"""

import functools
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass

import utils
from ads.arms import BY_NAME
from ads.data.traces import fingerprint_inputs
from ads.stage import files, hub, layout
from ads.stage.config import ignored_keys, load_config, to_dict
from ads.stage.errors import UserError
from ads.stage.settings import GenConfig, SearchConfig
from ads.stage.sidecar import is_finished
from ads.stage.world import print0, world_size
from utils import ROOT, print_result

NARROW = 0.05  # width of a bracket, relative to its upper end, that is not searched further
ROUNDING = 1e-9  # 0.71 - 0.70 is above 0.01
SET_BY_SEARCH = ("exp_dir", "trace_name", "data_split", "max_samples", "tau", "lam", "defence")

HIT = "hit"
NEAREST = "nearest"
TOO_HIGH = "not reachable, above the accuracy at the least value"
TOO_LOW = "not reachable, below the accuracy at the greatest value"
UNFINISHED = "not found within max_evaluations"
REMEDIES = {
    TOO_HIGH: "choose a lower target or a lower tau",
    TOO_LOW: "raise lam_max or tau_max",
    UNFINISHED: "raise max_evaluations, which keeps what was measured, or move lam_start or tau_start",
}


@dataclass(frozen=True)
class Limits:
    """The values of x, lam or tau, along which accuracy falls: where the search begins, its first step from
    there, and the last value."""

    least: float
    start: float
    most: float


@dataclass(frozen=True)
class Trial:
    """Settings of one evaluation, as they will stand in the grid."""

    tau: str
    lam: str
    defence: str

    @property
    def name(self):
        control = "" if self.defence == "ads" else f"_{self.defence}"
        return f"search_tau{self.tau}_lam{self.lam}{control}"


@dataclass(frozen=True)
class Measured:
    """Accuracy of the teacher at one value, with its 95 % interval, on n problems."""

    accuracy: float
    low: float
    high: float
    n: int

    def __str__(self):
        return f"{self.accuracy:.3f} [{self.low:.3f}, {self.high:.3f}], n {self.n}"


@dataclass(frozen=True)
class Found:
    """What the search of an arm found for one target: the nearest value, and whether that will do."""

    arm: str
    target: float
    x: float
    measured: Measured
    outcome: str


def main(arguments):
    cfg, words = parse(arguments)
    hub.read_commits(stages_dir(cfg))
    check_stages(cfg, words)
    utils.prepare_exp_dir(cfg.exp_dir)
    hub.record_commits(stages_dir(cfg))
    with files.stage_lock(cfg.exp_dir, f"search-{cfg.output}"):
        results = [found for arm in cfg.arm_names for found in search_arm(arm, cfg, words)]
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
    return cfg, words


def check_stages(cfg, words):
    """What would fail at the first stage, or at the last, fails here."""
    if world_size() > 1:
        raise UserError("search.py is one process: give the launcher as launch='...', it starts gentraces.py")
    if shutil.which(launcher(cfg)[0]) is None:
        raise UserError(f"launch={cfg.launch!r}: there is no command {launcher(cfg)[0]!r}")
    for arm in cfg.arm_names:
        stage = stage_config(make_trial(arm, limits_of(arm, cfg).start, cfg), cfg, words)
        if cfg.rule == "af" and not stage.answer_force:
            raise UserError("rule=af: needs answer_force=true, or choose rule=raw")
        fingerprint_inputs(stage)


def search_arm(arm, cfg, words):
    """What was Found for each target, highest first."""
    measured, limits = {}, limits_of(arm, cfg)
    evaluate = functools.partial(evaluate_stage, arm, cfg, words)
    return [find_value(arm, target, limits, cfg, measured, evaluate) for target in cfg.target_values]


def find_value(arm, target, limits, cfg, measured, evaluate):
    """What is Found for one target; `measured` ({x: Measured}) grows by at most cfg.max_evaluations."""
    num_left = cfg.max_evaluations
    while num_left and not judge(target, limits, cfg.tolerance, measured):
        x = propose(target, limits, measured)
        measured[x] = evaluate(x)
        num_left -= 1
    x = nearest(target, measured)
    return Found(arm, target, x, measured[x], judge(target, limits, cfg.tolerance, measured) or UNFINISHED)


def judge(target, limits, tolerance, measured):
    """The outcome of the search for one target; None while another evaluation is needed."""
    if not measured:
        return None
    if abs(measured[nearest(target, measured)].accuracy - target) <= tolerance + ROUNDING:
        return HIT
    low, high = bracket(target, measured)
    if low is None:
        return TOO_HIGH
    if high is None:
        return TOO_LOW if low >= limits.most else None
    return NEAREST if high - low <= NARROW * high else None


def nearest(target, measured):
    return min(measured, key=lambda x: (abs(measured[x].accuracy - target), x))


def bracket(target, measured):
    """(low, high): the first x whose accuracy is below the target, and the one before it; None for none."""
    high = min((x for x in measured if measured[x].accuracy < target), default=None)
    low = max((x for x in measured if high is None or x < high), default=None)
    return low, high


def propose(target, limits, measured):
    """The next x: doubled until it brackets the target, then interpolated, well inside the bracket."""
    if not measured:
        return limits.least
    low, high = bracket(target, measured)
    if high is None:
        return min(limits.most, limits.start if low < limits.start else three_digits(2 * low))
    above, below = measured[low].accuracy, measured[high].accuracy
    share = min(max((above - target) / (above - below), 0.25), 0.75)
    return three_digits(low + share * (high - low))


def three_digits(x):
    return float(f"{x:.3g}")


def limits_of(arm, cfg):
    if BY_NAME[arm].knob == "tau":
        return Limits(cfg.tau, cfg.tau_start, cfg.tau_max)
    return Limits(0.0, cfg.lam_start, cfg.lam_max)


def make_trial(arm, x, cfg):
    """Where x is at its least this is one trial for all arms."""
    if BY_NAME[arm].knob == "tau":
        return Trial(f"{x:.12g}", "0", "ads")
    return Trial(f"{cfg.tau:.12g}", f"{x:.12g}", BY_NAME[arm].defence if x else "ads")


def evaluate_stage(arm, cfg, words, x):
    """The accuracy at x, from the sidecar of its stage, which is run where it is not done."""
    trial = make_trial(arm, x, cfg)
    stage = stage_config(trial, cfg, words)
    if not is_finished(stage.sidecar_path, to_dict(stage), fingerprint_inputs(stage), ignored_keys(stage)):
        run_stage(trial, cfg, words)
    stats = files.read_yaml(stage.sidecar_path)["stats"]
    measured = Measured(*(stats[cfg.rule][key] for key in ("accuracy", "low", "high")), stats["n"])
    print0(f"{trial.name}: {cfg.rule} {measured}")
    return measured


def stage_config(trial, cfg, words):
    return load_config(GenConfig, ROOT / "gen_config.yaml", stage_words(trial, cfg, words))


def stages_dir(cfg):
    """A folder of their own: the report would take the evaluations for points of the experiment."""
    return layout.path_of("search", cfg.exp_dir)


def stage_words(trial, cfg, words):
    """The arguments of gentraces.py; the user's come first, as the first may name a YAML file."""
    max_samples = "null" if cfg.max_samples is None else cfg.max_samples
    ours = (f"exp_dir={stages_dir(cfg)}", f"trace_name={trial.name}", f"data_split={cfg.data_split}")
    settings = (f"max_samples={max_samples}", f"tau={trial.tau}", f"lam={trial.lam}")
    return [*words, *ours, *settings, f"defence={trial.defence}"]


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


def grid_lines(found, cfg, words):
    """Lines of the output for one target: a comment, and the grid's line where there is one."""
    trial = make_trial(found.arm, found.x, cfg)
    place = f"tau {trial.tau} lam {trial.lam}"
    accuracy = f"{cfg.rule} {found.measured}"
    comment = f"# {found.arm}, target {found.target:g}: {found.outcome}"
    if found.outcome in REMEDIES:
        return [f"{comment} (best: {accuracy} at {place}); {REMEDIES[found.outcome]}"]
    eps = f"{stage_config(trial, cfg, words).eps:g}" if float(trial.lam) else "0"
    line = [trial.tau, trial.lam, eps, *([] if trial.defence == "ads" else [f"defence={trial.defence}"])]
    return [f"{comment}, {accuracy} on {cfg.data_split}", " ".join(line)]


def describe(found, cfg):
    """What the result line says of one target."""
    trial = make_trial(found.arm, found.x, cfg)
    settings = {"arm": found.arm, "target": found.target, "tau": float(trial.tau), "lam": float(trial.lam)}
    return {**settings, **vars(found.measured), "outcome": found.outcome}


if __name__ == "__main__":
    utils.run_script(main)
