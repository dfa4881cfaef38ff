"""Training a reward."""

from typing import Any

from rest_jax.commands.options import AddCommand, add_gin_options, load_config
from rest_jax.preemption import stop_on_sigterm


def register(add: AddCommand) -> None:
    sub = add(
        "train_reward", _train_reward, "Train a reward on rated translations, or on labelled samples of a policy."
    )
    add_gin_options(sub)


def _train_reward(options: Any) -> None:
    import jax

    from rest_jax import config, paths, run_files, train_reward

    # A file may hold the run that uses the reward too; its MODEL_DIR does not matter here.
    load_config(options, fallbacks={"MODEL_DIR": "''"})
    training = config.build(train_reward.RewardTraining)
    train_reward.check(training)
    directory, sha256 = paths.resolve(training.reward_dir), training.vocabulary.sha256
    starts = {"REWARD_INITIAL_CHECKPOINT_PATH": (training.initial_checkpoint_path, sha256)}
    if training.samples is not None:
        samples = training.samples
        starts["INITIAL_CHECKPOINT_PATH"] = (samples.initial_checkpoint_path, samples.data.vocabulary.sha256)
    for field, (start, vocabulary) in starts.items():
        if start is not None:
            run_files.check_same_vocabulary(field, paths.resolve(start), vocabulary_sha256=vocabulary)
    run_files.check_same_run(directory, given=config.given_text(), vocabulary_sha256=sha256)
    if jax.process_index() == 0:
        run_files.write_run_files(
            directory,
            given=config.given_text(),
            operative=config.operative_text(),
            argv=options.argv,
            facts={"vocabulary_sha256": sha256},
        )
    with stop_on_sigterm() as stop_requested:
        print(train_reward.train_reward(training, stop_requested=stop_requested))
    print(f"Reward: {directory}")
