"""Kill the pipeline at random moments until it is done, and compare it with one that was left alone.

    python tests/chaos.py --runs 10 --kills 12 --seed 1     # kills of whole process groups
    python tests/chaos.py --runs 3 --kills 30 --attacks     # with attacks that read clean traces and models
    python tests/chaos.py --shards 20 --seed 1              # two shards on one EXP_DIR, one of them killed

Tiny random models, six stages, and with --attacks what attackers add. A kill is SIGKILL to the process
group, at a random moment of a stage drawn at random or, every second time, as soon as a temporary file
shows that something is being written. Afterwards every trace, grade, gradient and weight must be that of
the run left alone, and nothing that was finished may be gone at any time. Prints a table and one JSON line;
exit code 1 if anything was lost or differs.
"""

import argparse
import collections
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "scripts"))

from conftest import ROOT, byte_tokenizer, save_folder, tiny_model
from helpers_pipeline import pipeline_environment

from ads.data.tables import read_parquet
from ads.stage import files
from ads.stage.sidecar import read_sidecar

POINTS = ("0.8,0,0", "0.8,0.05,0")
SETTINGS = {
    "GEN_ARGS": "max_length=120 max_prompt_length=115 batch_size=2",
    "TRAIN_ARGS": "num_epochs=2 lora_r=4 batch_size=4 save_epochs=0.3",
    "OMP_NUM_THREADS": "1",
}
# one for each thing that is read; no trace of a random model is right, so that correct finds no row
ATTACKS = "naive mix50 fluent reweight_up mask20 correct"
MOST_SECONDS = 600  # of one start of the pipeline


def main():
    args = parse()
    if args.attacks:
        SETTINGS["ATTACKS"] = ATTACKS
    with tempfile.TemporaryDirectory(prefix="chaos") as folder:
        place = Path(folder)
        models, problems = prepare(place)
        start = time.time()
        reference = place / "reference"
        durations = measure(models, problems, reference)
        check = run_shards if args.shards else run_alone
        result = check(args, models, problems, place, reference, durations)
    result["minutes"] = round((time.time() - start) / 60, 1)
    print(json.dumps({**vars(args), **result}))
    sys.exit(1 if result["different"] or result["lost"] else 0)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10, help="runs of the whole experiment")
    parser.add_argument("--kills", type=int, default=12, help="kills in each")
    parser.add_argument("--shards", type=int, default=0, help="instead: pairs of shards on one EXP_DIR")
    parser.add_argument("--attacks", action="store_true", help=f"a student for each of {ATTACKS}")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def prepare(place):
    """({role: model folder}, data folder)."""
    tokenizer = byte_tokenizer()
    kinds = {"teacher": ("qwen2", 272), "proxy": ("qwen2", 264), "student": ("llama", 264)}
    models = {
        role: save_folder(place / role, tiny_model(kind, rows, seed=i), tokenizer)
        for i, (role, (kind, rows)) in enumerate(kinds.items())
    }
    (place / "sums").mkdir()
    for split, first in (("train", 10), ("holdout", 40), ("test", 70)):
        rows = [
            {"problem": f"{i}+{i % 7}=?", "solution": f"\\boxed{{{i + i % 7}}}"}
            for i in range(first, first + 12)
        ]
        (place / "sums" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return models, str(place / "sums")


class Pipeline:
    """A running pipeline.sh, its output followed in a file."""

    def __init__(self, models, problems, exp_dir, points=POINTS, **settings):
        settings = SETTINGS | {"GRID_ARGS": f"--points {' '.join(points)}"} | settings
        environment = pipeline_environment(models, problems, exp_dir, **settings)
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(
            ["bash", str(ROOT / "pipeline.sh")], env=environment, stdout=self.log, stderr=self.log,
            start_new_session=True,
        )  # fmt: skip
        self.end = time.time() + MOST_SECONDS

    def stages(self):
        """Those begun by this start, in order."""
        lines = Path(self.log.name).read_text(errors="replace").splitlines()
        return [line.split()[1] for line in lines if line.startswith("run ")]

    def is_running(self):
        assert time.time() < self.end, Path(self.log.name).read_text()
        return self.process.poll() is None

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self):
        while self.is_running():
            time.sleep(0.05)
        assert self.process.returncode == 0, Path(self.log.name).read_text()


def measure(models, problems, exp_dir):
    """Seconds of each stage of a run that is left alone."""
    pipeline, begun = Pipeline(models, problems, exp_dir), {}
    while pipeline.is_running():
        for stage in pipeline.stages():
            begun.setdefault(stage, time.time())
        time.sleep(0.05)
    pipeline.wait()
    times = [*begun.values(), time.time()]
    return {stage: after - before for stage, before, after in zip(begun, times, times[1:], strict=False)}


def run_alone(args, models, problems, place, reference, durations):
    counts, in_write, lost, different = collections.Counter(), 0, [], []
    for run in range(args.runs):
        generator = random.Random(1000 * args.seed + run)
        exp_dir = place / f"run{run}"
        kept = set()
        order = list(durations)
        # every stage as often as the next, what is left over at random
        targets = order * (args.kills // len(order)) + generator.sample(order, args.kills % len(order))
        targets.sort(key=order.index)
        for number, target in enumerate(targets):
            pipeline = Pipeline(models, problems, exp_dir)
            stage = kill_during(pipeline, target, exp_dir, generator, durations, in_a_write=number % 2)
            if stage is None:
                break
            counts[stage] += 1
            in_write += is_written_to(exp_dir)
            lost += sorted(kept - finished(exp_dir))
            kept |= finished(exp_dir)
        Pipeline(models, problems, exp_dir).wait()
        different += compare(exp_dir, reference)
        print(f"run {run}: {sum(counts.values())} kills so far, {in_write} within a write", flush=True)
        shutil.rmtree(exp_dir)
    for stage in durations:
        print(f"{stage:45}{counts[stage]:4}")
    kills = {"kills": sum(counts.values()), "kills_in_a_write": in_write, "kills_by_stage": dict(counts)}
    return {**kills, "lost": lost, "different": different}


def kill_during(pipeline, target, exp_dir, generator, durations, in_a_write):
    """Kill the pipeline within the stage `target` or a later one; that stage, None if it ended before."""
    moment = generator.uniform(0, durations[target])
    order = list(durations)
    began = None
    while pipeline.is_running():
        stage = (pipeline.stages() or [None])[-1]
        if stage and order.index(stage) >= order.index(target):
            began = began or time.time()
            late = time.time() - began > moment
            if late and (not in_a_write or is_written_to(exp_dir)):
                pipeline.kill()
                return stage
        time.sleep(0.001 if in_a_write and began else 0.02)
    return None


def is_written_to(exp_dir):
    """Whether a temporary file is there; folders may vanish meanwhile, which os.walk lets pass."""
    return any(
        name.startswith(".") and name.endswith(".tmp")
        for _, folders, files in os.walk(exp_dir)
        for name in [*folders, *files]
    )


def finished(exp_dir):
    """What a kill may not take away: sidecars, and rows in parts of stages that go on."""
    done = {str(path.relative_to(exp_dir)) for path in exp_dir.glob("*/*.yaml")}
    done |= {path.name for path in exp_dir.glob("student_grads.yaml")}
    for folder in exp_dir.glob("parts/*"):
        name = f"traces/{folder.name}.yaml"
        if name not in done:
            done |= {f"{folder.name}: {i}" for i in files.read_parts(folder / "traces")}
    # rows of a finished stage are in its dataset
    for path in exp_dir.glob("traces/*.yaml"):
        done |= {f"{path.stem}: {row['id']}" for row in rows_of(path)}
    return done


def rows_of(sidecar):
    """The rows of a dataset; none where an attack left none, of which there is no table."""
    has_rows = files.read_yaml(sidecar)["stats"]["n"]
    return read_parquet(sidecar.with_suffix(".parquet")) if has_rows else []


def compare(exp_dir, reference):
    """What is not as in the reference: rows of traces, else outputs by fingerprint and what was measured."""
    paths = [*reference.glob("*/*.yaml"), reference / "student_grads.yaml"]
    found = []
    for name in [path.relative_to(reference) for path in paths]:
        if not (exp_dir / name).exists():
            found.append(f"{exp_dir.name}/{name} is missing")
        elif name.parent.name == "attacks":  # recipes, as they were copied
            if (exp_dir / name).read_bytes() != (reference / name).read_bytes():
                found.append(f"{exp_dir.name}/{name}")
        elif name.parent.name == "traces":
            if rows_of(exp_dir / name) != rows_of(reference / name):
                found.append(f"{exp_dir.name}/{name}: rows")
        else:
            ours, theirs = (read_sidecar(top / name) for top in (exp_dir, reference))
            differing = [key for key in ("outputs", "stats") if ours[key] != theirs[key]]
            found += [f"{exp_dir.name}/{name}: {ours[key]}, not {theirs[key]}" for key in differing]
    return found


def run_shards(args, models, problems, place, reference, durations):
    """Each shard has one point; what both need is made by whoever comes first."""
    lost, different, num_kills = [], [], 0
    for run in range(args.shards):
        generator = random.Random(1000 * args.seed + run)
        exp_dir = place / f"pair{run}"
        shards = [Pipeline(models, problems, exp_dir, [point]) for point in POINTS]
        victim = generator.randrange(2)
        for _ in range(generator.randint(1, 2)):
            time.sleep(generator.uniform(1, 0.6 * sum(durations.values())))
            if shards[victim].is_running():
                shards[victim].kill()
                num_kills += 1
            shards[victim] = Pipeline(models, problems, exp_dir, [POINTS[victim]])
        for shard in shards:
            shard.wait()
        different += compare(exp_dir, reference)
        lost += [f"pair{run}: {name}" for name in missing_or_doubled(exp_dir)]
        print(f"pair {run}: {num_kills} kills so far", flush=True)
        shutil.rmtree(exp_dir)
    return {"pairs": args.shards, "kills": num_kills, "lost": lost, "different": different}


def missing_or_doubled(exp_dir):
    """Students of grid points that the report does not have exactly once."""
    subprocess.run([sys.executable, str(ROOT / "report.py"), str(exp_dir)], check=True, capture_output=True)
    with (exp_dir / "report" / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] and row["tau"]]
    found = collections.Counter((float(row["tau"]), float(row["lam"]), row["attack"]) for row in rows)
    attacks = SETTINGS.get("ATTACKS", "naive").split()
    wanted = {(*map(float, point.split(",")[:2]), attack): 1 for point in POINTS for attack in attacks}
    return [] if found == wanted else [f"students {dict(found)}, not {wanted}"]


if __name__ == "__main__":
    main()
