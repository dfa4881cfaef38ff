"""Macros that T5X's gin files and command lines set, and that are something else here, or nothing."""

# They change nothing that is computed here, so a run with them goes on, and says so.
IGNORED = {
    "EVAL_STEPS": "D_eval is measured on SELECTION_SOURCES sources, by their samples' reward",
    "EVALUATOR_NUM_EXAMPLES": "the test split is measured on Evaluation.max_test_sources",
    "EVALUATOR_USE_MEMORY_CACHE": "tokenised splits are mapped from CACHE_DIR",
    "INFER_OUTPUT_DIR": "only `rest_jax infer` writes there; this command writes into MODEL_DIR",
    "JSON_WRITE_N_RESULTS": "eval/*.jsonl have every example",
    "SHUFFLE_TRAIN_EXAMPLES": "training data is shuffled by RANDOM_SEED",
    "USE_CACHED_TASKS": "a task is tokenised once, into CACHE_DIR, whether seqio has cached it or not",
    "USE_HARDWARE_RNG": "random numbers are JAX's own, the same on all hardware",
}
# They would change something, under another name.
INSTEAD = {
    "CHECKPOINT_PATH": "it is for `rest_jax infer`; a run starts from INITIAL_CHECKPOINT_PATH",
    "MIXTURE_OR_TASK_MODULE": "give TASK_MODULES, a tuple, e.g. TASK_MODULES = ('my_tasks',)",
    "TRAIN_STEPS_RELATIVE": "TRAIN_STEPS counts from INITIAL_CHECKPOINT_PATH on already",
}


def note(name: str) -> str:
    """What to tell about an ignored macro."""
    return f"{name} is T5X's and has no effect here: {IGNORED[name]}."
