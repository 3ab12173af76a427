"""Fine-tune a student on traces -> EXP_DIR/models/NAME/final, an ordinary Hugging Face model (stage 4).

    python distill.py train_traces=runs/x/traces/train.parquet holdout_traces=runs/x/traces/holdout.parquet \\
        student=meta-llama/Llama-3.2-3B tokenizer=meta-llama/Llama-3.2-3B-Instruct exp_dir=runs/x
    python distill.py solutions=word_problems_pretrain lora=false do_eval=false student=... exp_dir=runs/x
    accelerate launch --config_file acc_config.yaml distill.py ...

Settings: train_config.yaml, then key=value. --check only says whether the stage is done (exit code 0) or not
(3).
"""

import time

import utils
from ads import chat
from ads.data.examples import load_examples, load_training
from ads.data.problems import fingerprint_data
from ads.stage.fingerprint import fingerprint_json
from ads.stage.inputs import fingerprint_existing, fingerprint_model, fingerprint_tokenizer
from ads.stage.settings import TrainConfig
from utils import print_result

NUM_COMPARED, COMPARED_TOKENS = 3, 256  # sequences, and tokens of each, that a saved student is checked on


def main(arguments):
    cfg, inputs = utils.begin_stage(TrainConfig, "train_config.yaml", fingerprint_inputs, arguments)
    utils.run_stage(cfg, inputs, distil)


def fingerprint_inputs(cfg):
    """What the student depends on besides the settings."""
    inputs = {
        "student": fingerprint_model(cfg.student),
        "tokenizer": fingerprint_tokenizer(cfg.tokenizer or cfg.student),
    }
    if cfg.solutions:
        inputs["solutions"] = fingerprint_data(cfg.solutions, cfg.data_dir)
    else:
        inputs["train_traces"] = fingerprint_existing(cfg.train_traces, "make it with gentraces.py")
    if cfg.do_eval:
        inputs["holdout_traces"] = fingerprint_existing(cfg.holdout_traces, "make it with gentraces.py")
    return inputs


def distil(cfg, inputs, world):
    from ads.attacks import training, weighting

    start = time.time()
    tokenizer = chat.load_tokenizer_for(cfg.student, cfg.tokenizer)
    train, num_cut = load_training(cfg, tokenizer)
    weighting.count_masked(cfg.mask_share, train)  # which leaves some
    holdout = load_examples(cfg, tokenizer, cfg.holdout_traces)[0] if cfg.do_eval else None
    made_with = training.resolve_numerics(cfg, world.device)
    made_with |= {"sequences": fingerprint_json([train, holdout])}
    utils.begin_parts(cfg, cfg.model_path, inputs | made_with, world)

    trainer, trained = training.train_student(cfg, tokenizer, train, holdout, world)
    if world.is_main:
        rows = [example["input_ids"][:COMPARED_TOKENS] for example in train[:NUM_COMPARED]]
        training.save_student(cfg, training.unwrap_model(trainer), tokenizer, world.device, rows)
        counts = {"n": len(trained), "num_cut": num_cut, **weighting.describe(cfg, train, trained)}
        finish(cfg, inputs, made_with, trainer, counts, start)


def finish(cfg, inputs, made_with, trainer, counts, start):
    """What the student has learned, and what ends every stage."""
    history = trainer.state.log_history
    curves = {
        name: [[entry["step"], entry[key]] for entry in history if key in entry]
        for name, key in (("train", "loss"), ("holdout", "eval_loss"))
    }
    train, holdout = ([loss for _, loss in curve] or [None] for curve in curves.values())
    stats = {
        **counts,
        "num_steps": trainer.state.global_step,
        "train_loss": train[-1],
        "holdout_loss_start": holdout[0],
        "holdout_loss": holdout[-1],
    }
    given = cfg, "model", cfg.model_path, inputs, stats, start, cfg.student_path
    utils.finish_stage(*given, losses=curves, **made_with)
    print_result(model_name=cfg.model_name, model=str(cfg.student_path), **stats)


if __name__ == "__main__":
    utils.run_script(main)
