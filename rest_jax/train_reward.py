"""Training a reward: a T5 regressor on rated translations, with synthetic failures, stopped on Kendall's tau.

MetricX-24's recipe (Juraska et al. 2024, arXiv 2410.03983) on any of our networks and with any scores. The loop,
checkpoints, mesh and optimisers are those of the policy's training.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from rest_jax import paths
from rest_jax import rest as rest_lib
from rest_jax import training as training_lib
from rest_jax.checkpoints import checkpointer
from rest_jax.data.batching import MixtureSpec
from rest_jax.data.ratings import Ratings, RatingsSource, Store
from rest_jax.data.vocabulary import Vocabulary, adopt
from rest_jax.errors import UserError
from rest_jax.evaluation.agreement import agreement, kendall
from rest_jax.filters import Threshold
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.models.initial_params import initial_params
from rest_jax.models.regressor import fresh_head, with_head
from rest_jax.objectives import squared_error
from rest_jax.partitioning import Partitioner
from rest_jax.reporting.metrics_writer import MetricsWriter
from rest_jax.reporting.progress import ProgressLine
from rest_jax.rewards import regressor
from rest_jax.rewards.base import Reward
from rest_jax.rewards.corruptions import CORRUPTIONS, length_agreement
from rest_jax.rewards.joined_input import WITHOUT_REFERENCE, JoinedInput

Params = Any
PHASE = "train_reward"
# Inputs that share a packed row at most.
MAX_PACKED = 32
# Inputs that one call of the scoring program takes: any number of ratings is one compilation.
_SCORED_TOGETHER = 512
# What is wrong in them is beyond doubt; a label for words in another order, say, would be a guess.
FAILURES = ("empty", "gibberish", "unrelated", "copied_source")
SHORTENED_OR_LENGTHENED = ("truncated", "with_omissions", "repeated")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardTraining:
    """How a reward is trained, as bound in gin.

    Attributes:
      reward_dir: where everything is written; what `rewards.regressor.Regressor` takes.
      model: its network, whose vocabulary must be `vocabulary`.
      vocabulary: the policy's.
      ratings: what is learned from; None to draw and label samples first, as `samples` says.
      samples: a run whose policy draws `samples.growing.sampling.num_samples` translations of each source, labelled by
        `label` and all kept, into reward_dir/samples; None where there are ratings.
      label: the reward that labels them.
      relative_labels: of these samples; labels are less the mean of their source's, and minus and plus this number
        become 0 and 1: what is easy to translate is not learned, only which sample is better. None: labels as they are.
      training: steps, batch, schedule; its eval_period and patience say when it stops on Kendall's tau.
      partitioner: the mesh and its rules.
      length: most tokens of an input; longer ones lose their end.
      template: the encoder's input; see `rewards.joined_input`. Without `{sample}` the decoder reads that, which knows
        from a policy's checkpoint how translations of the source go on.
      held_out: the share of the sources whose ratings are held out.
      max_held_out: most ratings that are held out.
      synthetic: synthetic failures by ratings, in training.
      synthetic_kinds: of these, an equal number each; of FAILURES with label 0, or of SHORTENED_OR_LENGTHENED, whose
        label is the translation's times the ratio of lengths.
      initial_checkpoint_path: a policy's or another model's parameters, of any format, or a reward's directory; None
        for random ones.
      seed: of everything random.
    """

    reward_dir: str
    model: EncoderDecoderModel
    vocabulary: Vocabulary
    training: training_lib.Training
    partitioner: Partitioner
    length: int
    ratings: RatingsSource | None = None
    samples: rest_lib.ReST | None = None
    label: Reward | None = None
    relative_labels: float | None = None
    template: str = WITHOUT_REFERENCE
    held_out: float = 0.1
    max_held_out: int = 4000
    synthetic: float = 0.2
    synthetic_kinds: tuple[str, ...] = (*FAILURES, *SHORTENED_OR_LENGTHENED)
    initial_checkpoint_path: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", adopt(self.vocabulary))
        object.__setattr__(self, "synthetic_kinds", tuple(self.synthetic_kinds))
        if (self.ratings is None) == (self.samples is None) or (self.samples is None) != (self.label is None):
            raise UserError(
                "RewardTraining: set ratings (a table, errors or a store), or samples and label (a run to draw from, "
                "and the reward that labels what it draws)."
            )
        if self.samples is not None and self.samples.bc.steps:
            raise UserError(
                f"RewardTraining.samples is a run of {self.samples.bc.steps} steps of BC: it would train another "
                "policy than that run's. Give the policy to draw from, INITIAL_CHECKPOINT_PATH = 'MODEL_DIR/policy' of "
                "the run, and TRAIN_STEPS = 0."
            )
        if self.relative_labels is not None and (self.samples is None or self.relative_labels <= 0):
            raise UserError(
                f"RewardTraining.relative_labels is {self.relative_labels}; give a number above 0, with samples. "
                "Ratings of a store have Store.relative."
            )
        if not 0 < self.held_out < 1 or self.max_held_out < 2:
            raise UserError(
                f"RewardTraining.held_out is {self.held_out}, max_held_out {self.max_held_out}; a share between 0 and "
                "1, and at least 2, are legal."
            )
        unknown = set(self.synthetic_kinds) - {*FAILURES, *SHORTENED_OR_LENGTHENED}
        if self.synthetic < 0 or unknown or (self.synthetic and not self.synthetic_kinds):
            raise UserError(
                f"RewardTraining.synthetic is {self.synthetic}, of kinds {self.synthetic_kinds}; a share of at least "
                f"0, and some of {', '.join((*FAILURES, *SHORTENED_OR_LENGTHENED))}, are legal."
            )


def check(config: RewardTraining) -> JoinedInput:
    """How inputs are made, once everything is found in order that can be without reading ratings.

    Raises:
      UserError: what is not.
    """
    training, module = config.training, config.model.module
    config.partitioner.check_batch_divisible(
        training.batch_size, "REWARD_BATCH_SIZE", microbatches=training.microbatches
    )
    joined = JoinedInput.from_template(config.template, config.vocabulary)
    if config.length < joined.num_constant_tokens + 2:
        raise UserError(
            f"RewardTraining.length is {config.length}, but the template alone has {joined.num_constant_tokens} "
            "tokens; raise it to what source and translation need."
        )
    if module.config.vocab_size < config.vocabulary.vocab_size:
        raise UserError(
            f"MODEL has {module.config.vocab_size} embeddings, VOCABULARY {config.vocabulary.vocab_size} ids."
        )
    _initial_params(config, only_check=True)
    return joined


def train_reward(config: RewardTraining, *, stop_requested: Callable[[], bool] = lambda: False) -> str:
    """Trains, and writes the reward into `reward_dir`; what an interrupted call has done is not done again.

    Returns:
      The report, as text; `reward_dir/summary.json` has its numbers.

    Raises:
      Preempted: after saving, when `stop_requested`.
    """
    joined = check(config)
    directory, started = paths.resolve(config.reward_dir), time.monotonic()
    if (directory / regressor.REWARD_FILE).is_file():
        return format_summary(json.loads((directory / "summary.json").read_text(encoding="utf-8")))
    ratings = _read_ratings(config, stop_requested=stop_requested)
    if "reference" in joined.fields and ratings.references is None:
        raise UserError(f"TEMPLATE {config.template!r} has a reference, but the ratings have none.")
    train_rows, held_rows = _split(ratings, share=config.held_out, most=config.max_held_out)
    kept, held = ratings.take(train_rows), ratings.take(held_rows)
    synthetic = synthetic_failures(
        kept,
        kinds=config.synthetic_kinds,
        number=round(config.synthetic * len(kept)),
        vocabulary=config.vocabulary,
        seed=config.seed,
    )
    parts = [_examples(part, joined=joined, eos_id=config.vocabulary.eos_id) for part in (kept, *synthetic.values())]
    progress = ProgressLine("train_reward", enabled=jax.process_index() == 0)
    cut = sum(int(np.count_nonzero(part.source_lengths > config.length)) for part in parts)
    progress.log_event(
        f"{len(kept)} ratings of {len(np.unique(kept.source_keys()))} sources, "
        f"{sum(map(len, synthetic.values()))} synthetic failures; {len(held)} ratings of "
        f"{len(np.unique(held.source_keys()))} other sources are held out; {cut} inputs are longer than {config.length}"
    )
    score = _scorer(config, joined)
    module, training = config.model.module, dataclasses.replace(config.training, objective=squared_error)
    abstract = jax.eval_shape(lambda key: regressor.initial_regressor(module, key), jax.random.key(0))
    steps = config.length if joined.sample_in_decoder else MAX_PACKED if training.pack else 1
    with MetricsWriter(directory, enabled=jax.process_index() == 0) as writer:
        result = training_lib.fit(
            directory=directory / "training",
            training=training,
            model=config.model,
            partitioner=config.partitioner,
            initial_params=lambda: _initial_params(config),
            abstract_params=abstract,
            mixture=MixtureSpec(tuple(parts), tuple(map(len, parts))),
            lengths={"inputs": config.length, "targets": steps},
            mean_reward=lambda params: kendall(score(params, held), held.scores),
            initial_reward=None,
            seed=rest_lib.phase_seed(config.seed, PHASE),
            progress=progress,
            metrics_writer=writer,
            phase=PHASE,
            stop_requested=stop_requested,
            measured=("kendall", "Kendall's tau on held-out ratings"),
        )
    best = checkpointer.step_directory(directory / "training", result.best_step)
    params = checkpointer.load_params(str(best), abstract_params=abstract, partitioner=config.partitioner)
    scores = score(params, held)
    summary = {
        "ratings": len(kept),
        "synthetic": {kind: len(part) for kind, part in synthetic.items()},
        "held_out": len(held),
        "best_step": result.best_step,
        "steps": result.steps,
        "history": result.history,
        "agreement": agreement(scores, held.scores, groups=held.source_keys()),
        "mean_score": float(scores.mean()),
        "mean_label": float(held.scores.mean()),
        "failures_below_original": _failures_below(config, held, scores, score=lambda part: score(params, part)),
        "seconds": round(time.monotonic() - started, 2),
    }
    paths.write_json(directory / "summary.json", summary)
    files = regressor.RegressorFiles(
        config=module.config,
        joined=joined,
        length=config.length,
        vocabulary_sha256=config.vocabulary.sha256,
    )
    facts = {"template": config.template, "labels": repr(config.label or config.ratings)}
    regressor.write(directory, files=files, params=params, vocabulary=config.vocabulary, facts=facts)
    return format_summary(summary)


def synthetic_failures(
    ratings: Ratings, *, kinds: Sequence[str], number: int, vocabulary: Vocabulary, seed: int
) -> dict[str, Ratings]:
    """About `number` bad translations in all, by kind, with their labels.

    Made of the references where there are some, which count as translations of score 1, else of the hypotheses. A
    translation that is too short to be spoilt is left out.
    """
    rng = np.random.default_rng(seed)
    made: dict[str, Ratings] = {}
    for kind in kinds if number else ():
        size = min(max(number // len(kinds), 1), len(ratings))
        chosen = ratings.take(np.sort(rng.choice(len(ratings), size, replace=False)))
        good = chosen.hypotheses if chosen.references is None else chosen.references
        scores = chosen.scores if chosen.references is None else np.ones(len(chosen), np.float32)
        sources, translations = (
            [vocabulary.decode(tokens.tolist()) for tokens in side] for side in (chosen.sources, good)
        )
        variants = CORRUPTIONS[kind](sources, translations, rng)
        labels = np.zeros(len(chosen), np.float32)
        if kind in SHORTENED_OR_LENGTHENED:
            labels = scores * np.asarray(list(map(length_agreement, variants, translations)), np.float32)
        spoilt = np.asarray([variant != text for variant, text in zip(variants, translations, strict=True)], bool)
        hypotheses = [np.asarray(vocabulary.encode(text), np.int32) for text in variants]
        if spoilt.any():
            everything = dataclasses.replace(chosen, hypotheses=hypotheses, scores=labels)
            made[kind] = everything.take(np.flatnonzero(spoilt))
    return made


def format_summary(summary: Mapping[str, Any]) -> str:
    """The report as text."""
    values = summary["agreement"]
    lines = [
        f"best step {summary['best_step']} of {summary['steps']}, on {summary['held_out']} held-out ratings "
        f"(mean score {summary['mean_score']:.4f}, mean label {summary['mean_label']:.4f}):",
        *(f"  {name:18} {values[name]:.4f}" for name in ("pearson", "spearman", "kendall")),
        f"  {'pairwise accuracy':18} {values['pairwise_accuracy']:.4f}  ({values['pairs']} pairs of one source)",
        "synthetic failures that score below the translation they were made of:",
        *(f"  {kind:18} {share:.4f}" for kind, share in summary["failures_below_original"].items()),
    ]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class _Examples:
    """Labelled inputs, as `data.batching.LabelledExamples`; the target is what the decoder reads, or its one step."""

    source_ids: npt.NDArray[np.int64]
    source_lengths: npt.NDArray[np.int32]
    target_lengths: npt.NDArray[np.int32]
    labels: npt.NDArray[np.float32]
    joined: Sequence[npt.NDArray[np.int32]]
    samples: Sequence[npt.NDArray[np.int32]]

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, index: int) -> npt.NDArray[np.int32]:
        return self.joined[index]

    def targets(self, index: int) -> npt.NDArray[np.int32]:
        return self.samples[index]


def _examples(ratings: Ratings, *, joined: JoinedInput, eos_id: int) -> _Examples:
    inputs = _inputs(ratings, joined)
    nothing = np.zeros(0, np.int32)
    read = ratings.hypotheses if joined.sample_in_decoder else [nothing] * len(ratings)
    samples = [np.append(tokens, np.int32(eos_id)) for tokens in read]
    return _Examples(
        source_ids=np.arange(len(ratings), dtype=np.int64),
        source_lengths=np.asarray([len(tokens) for tokens in inputs], np.int32),
        target_lengths=np.asarray([len(tokens) for tokens in samples], np.int32),
        labels=ratings.scores,
        joined=inputs,
        samples=samples,
    )


def _inputs(ratings: Ratings, joined: JoinedInput) -> list[npt.NDArray[np.int32]]:
    references = ratings.references if ratings.references is not None else ratings.hypotheses
    rows = zip(ratings.sources, ratings.hypotheses, references, strict=True)
    return [joined.join({"source": s, "sample": h, "reference": r}) for s, h, r in rows]


def _split(ratings: Ratings, *, share: float, most: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows to train on and rows held out; all rows of a source are on one side, whatever other rows there are."""
    keys = ratings.source_keys()
    held = keys < np.uint64(min(share, most / len(ratings)) * 2**64)
    if held.all() or not held.any():
        raise UserError(
            f"{len(np.unique(keys))} sources are too few to hold out a share of {share:g}; give more ratings, or set "
            "RewardTraining.held_out to another share."
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def _read_ratings(config: RewardTraining, *, stop_requested: Callable[[], bool]) -> Ratings:
    if config.ratings is not None:
        return config.ratings.read(config.vocabulary)
    assert config.samples is not None and config.label is not None
    # Other draws than the run's own first Grow step, and all of them: what it would refuse teaches most.
    samples = dataclasses.replace(
        config.samples,
        model_dir=str(paths.resolve(config.reward_dir) / "samples"),
        reward=config.label,
        seed=rest_lib.phase_seed(config.seed, "samples"),
        grow_steps=1,
        improve_steps=0,
        bc_long=False,
        growing=dataclasses.replace(
            config.samples.growing, filter=Threshold(-1.0), refuse_unfinished=False, max_repeated_ngrams=None
        ),
    )
    runner = rest_lib.Runner(samples, stop_requested=stop_requested)
    runner.run([phase for phase in runner.phases if phase.kind in ("bc", "grow")])
    directory, spread = str(paths.resolve(samples.model_dir) / "grow_1"), config.relative_labels
    if spread is None:
        return Store(directory=directory).read(config.vocabulary)
    return Store(directory=directory, relative=True, scale=(-spread, spread)).read(config.vocabulary)


def _scorer(config: RewardTraining, joined: JoinedInput) -> Callable[[Params, Ratings], npt.NDArray[np.float32]]:
    """`(params, ratings) -> scores float32 [rows]`, as the reward gives them."""
    module, eos_id = config.model.module, config.vocabulary.eos_id

    @jax.jit
    def rewarded(params: Params, inputs: jax.Array) -> jax.Array:
        scores = regressor.score_inputs(module, params, inputs, joined=joined, eos_id=eos_id, rows_per_step=64)
        return scores.clip(0, 1)

    def score(params: Params, ratings: Ratings) -> npt.NDArray[np.float32]:
        rows = np.zeros((-(-len(ratings) // _SCORED_TOGETHER) * _SCORED_TOGETHER, config.length), np.int32)
        for row, tokens, sample in zip(rows, _inputs(ratings, joined), ratings.hypotheses, strict=False):
            whole = [*tokens, eos_id, *sample] if joined.sample_in_decoder else tokens
            row[: len(whole)] = whole[: config.length]
        blocks = rows.reshape(-1, _SCORED_TOGETHER, config.length)
        return np.concatenate([jax.device_get(rewarded(params, block)) for block in blocks])[: len(ratings)]

    return score


def _failures_below(
    config: RewardTraining,
    held: Ratings,
    scores: npt.NDArray[np.float32],
    *,
    score: Callable[[Ratings], npt.NDArray[np.float32]],
) -> dict[str, float]:
    """Kind -> how often the variant of a held-out translation scores below it; kinds that were not trained on too.

    Of some 500 translations, which is exact to some 4 %.
    """
    shares = {}
    some = np.arange(0, len(held), -(-len(held) // _SCORED_TOGETHER))
    held, scores = held.take(some), scores[some]
    rng = np.random.default_rng(config.seed)
    sources, texts = (
        [config.vocabulary.decode(tokens.tolist()) for tokens in side] for side in (held.sources, held.hypotheses)
    )
    for kind, corrupt in CORRUPTIONS.items():
        variants = corrupt(sources, texts, rng)
        spoilt = np.asarray([variant != text for variant, text in zip(variants, texts, strict=True)], bool)
        if spoilt.any():
            hypotheses = [np.asarray(config.vocabulary.encode(text), np.int32) for text in variants]
            found = score(dataclasses.replace(held, hypotheses=hypotheses))
            shares[kind] = float(np.mean(found[spoilt] < scores[spoilt]))
    return shares


def _initial_params(config: RewardTraining, *, only_check: bool = False) -> Params:
    """The parameters to start from, on the mesh; nothing is read where they are only checked."""
    module, path, key = config.model.module, config.initial_checkpoint_path, jax.random.key(config.seed)
    fresh = lambda: regressor.initial_regressor(module, key)  # noqa: E731
    shardings = config.partitioner.param_shardings(jax.eval_shape(fresh))
    if path is None:
        return None if only_check else jax.jit(fresh, out_shardings=shardings)()
    is_reward = (regressor.paths.resolve(path) / regressor.REWARD_FILE).is_file()
    if is_reward:
        path, abstract = f"{path}/{regressor.PARAMS}", jax.eval_shape(fresh)
    else:
        abstract = jax.eval_shape(lambda: initial_params(config.model, key))
    if only_check:
        checkpointer.check_fits(path, abstract_params=abstract)
        return None
    params = checkpointer.load_params(path, abstract_params=abstract, partitioner=config.partitioner)
    return params if is_reward else with_head(params, fresh_head(key, module.config.emb_dim))
