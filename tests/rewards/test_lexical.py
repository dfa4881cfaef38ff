"""chrF, chrF++ and BLEU in the graph against sacreBLEU's sentence scores of the decoded texts."""

import functools
import random
import re

import jax
import numpy as np
import pytest
from sacrebleu.metrics import BLEU as SacreBLEU
from sacrebleu.metrics import CHRF

from rest_jax.data.vocabulary import SentencePieceVocabulary
from rest_jax.errors import UserError
from rest_jax.partitioning import Partitioner, make_mesh, standard_logical_axis_rules
from rest_jax.rewards import lexical
from rest_jax.rewards.base import Reward, check_reward
from rest_jax.rewards.bleu import BLEU
from rest_jax.rewards.chrf import ChrF

LENGTH = 128
TOLERANCE = 1e-4
REWARDS = [ChrF(), ChrF(word_order=2), BLEU()]
all_rewards = pytest.mark.parametrize("reward", REWARDS, ids=[reward.name for reward in REWARDS])


def padded(rows: list[list[int]], length: int = LENGTH) -> np.ndarray:
    """Token ids `[rows, length]`: each row cut, EOS after it."""
    tokens = np.zeros((len(rows), length), np.int32)
    for target, row in zip(tokens, rows, strict=True):
        row = [*row[: length - 1], 1]
        target[: len(row)] = row
    return tokens


@functools.partial(jax.jit, static_argnums=0)
def program(reward: Reward, params, batch):
    return reward.combine(reward.score(params, batch))


def scores(reward: Reward, params, samples: np.ndarray, references: np.ndarray) -> np.ndarray:
    return np.asarray(program(reward, params, {"samples": samples, "references": references, "sources": references}))


def sacrebleu_scores(
    reward: Reward, vocabulary: SentencePieceVocabulary, samples: np.ndarray, references: np.ndarray
) -> np.ndarray:
    metric = (
        SacreBLEU(effective_order=True, max_ngram_order=reward.max_ngram_order)
        if isinstance(reward, BLEU)
        else CHRF(char_order=reward.char_order, word_order=reward.word_order, beta=reward.beta)
    )
    return np.asarray(
        [
            [metric.sentence_score(vocabulary.decode(row), [reference]).score / 100 for row in rows.tolist()]
            for rows, reference in zip(samples, map(vocabulary.decode, references.tolist()), strict=True)
        ]
    )


def faulty(rng: random.Random, *, reference: list[int], other: list[int], vocab_size: int) -> list[int]:
    """What a policy might draw instead of `reference`: from one wrong token to a wrong sentence."""
    tokens = list(reference)
    match rng.randrange(7):
        case 0:  # tokens replaced, among them bytes that end no character, and the unknown token
            return [rng.randrange(2, vocab_size) if rng.random() < 0.1 else token for token in tokens]
        case 1:
            return [token for token in tokens if rng.random() < 0.8]
        case 2:
            rng.shuffle(tokens)
            return tokens
        case 3:
            return tokens[: rng.randrange(len(tokens) + 1)]
        case 4:
            return tokens[: rng.randrange(1, 12)] * 12
        case 5:
            return other
        case _:
            cut = rng.randrange(len(tokens) + 1)
            return tokens[:cut] + other[cut:]


@all_rewards
@pytest.mark.parametrize("num_sources", [64, pytest.param(625, marks=pytest.mark.slow)])
def test_real_pairs_score_as_in_sacrebleu(reward, num_sources, demo_pairs, small_vocabulary):
    rng = random.Random(1)
    num_samples = 16
    texts = [pair[rng.randrange(2)] for pair in rng.sample(demo_pairs, num_sources)]
    encoded = [small_vocabulary.encode(text) for text in texts]
    samples = padded(
        [
            faulty(rng, reference=tokens, other=rng.choice(encoded), vocab_size=small_vocabulary.vocab_size)
            for tokens in encoded
            for _ in range(num_samples)
        ]
    ).reshape(num_sources, num_samples, LENGTH)
    references = padded(encoded)
    found = scores(reward, reward.init(small_vocabulary), samples, references)
    expected = sacrebleu_scores(reward, small_vocabulary, samples, references)
    assert found.shape == (num_sources, num_samples) and found.dtype == np.float32
    # The faults must cover the scale, or agreement would mean little.
    assert expected.min() < 0.05 and expected.max() > 0.95 and expected.std() > 0.2
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


ODD_TEXTS = [
    "", "a", " ", "ab", "abcdef", "abcdefg", "aaaaaaaaaaaaaaaaaaaa", "aaaaaaa", "abababababab", "你好，世界。",
    "世界你好", "🙂", "🙂🙂🙂 ok", "\U0001f469\u200d\U0001f467 Größe", "Größe", "e\u0301e\u0301", "⁇ ⁇", "a\u3000b",
    "x" * 31, "x" * 32, "x" * 33, "xy" * 60, "It cost 1.5, or 1,000. No...", "it cost 1.5,or 1,000 .No ...",
    "((a)) (b", "a b a b a", "one-\ntwo -\n", "onetwo-", "&quot;R&amp;amp;D&quot; &lt;skipped>", '"R&amp;D" <skipped>',
    "don't a-b 3-4 /x", "a\x1cb\x85c",
]  # fmt: skip


@pytest.mark.parametrize(
    "reward",
    [
        *REWARDS,
        ChrF(char_order=1, beta=1),
        ChrF(char_order=16, word_order=5),
        BLEU(max_ngram_order=1),
    ],
    ids=repr,
)
def test_odd_texts_score_as_in_sacrebleu(small_vocabulary, reward):
    encoded = [small_vocabulary.encode(text) for text in ODD_TEXTS]
    # Not only decodable text: the unknown token, and bytes that are no UTF-8.
    byte = [i for i in range(small_vocabulary.vocab_size) if small_vocabulary.is_byte(i)]
    encoded += [[2], [2, 2, 2], byte[0xE0:0xF4], [byte[0x80], byte[0xC3], *encoded[3]]]
    # A policy may draw U+0000, which is a character like others.
    encoded += [[byte[0]], [*encoded[3], byte[0], byte[0], *encoded[3], byte[0]]]
    references = padded(encoded)
    samples = np.broadcast_to(references, (len(encoded), *references.shape))  # each against each
    np.testing.assert_allclose(
        scores(reward, reward.init(small_vocabulary), samples, references),
        sacrebleu_scores(reward, small_vocabulary, samples, references),
        rtol=0,
        atol=TOLERANCE,
    )


@all_rewards
@pytest.mark.parametrize(
    "characters", [129, 256, *(pytest.param(width, marks=pytest.mark.slow) for width in (128, 257, 512, 513, 900))]
)
def test_every_width_gives_the_same_scores(reward, small_vocabulary, characters):
    """Texts on either side of the widths for which the program has branches, with the longest text in either role."""
    rng = random.Random(characters)
    long = small_vocabulary.encode("".join(rng.choices("abcdefgh ", k=characters * 9 // 8)))
    short = small_vocabulary.encode("bad cafe bag head")
    length = 1024  # one shape for all cases
    assert len(long) < length
    references = padded([long, short], length)
    samples = np.stack([padded([short, long, long[5:]], length)] * 2)
    np.testing.assert_allclose(
        scores(reward, reward.init(small_vocabulary), samples, references),
        sacrebleu_scores(reward, small_vocabulary, samples, references),
        rtol=0,
        atol=TOLERANCE,
    )


# Programs for one shape serve the tests from here on: 16 sources of 2 samples.
PLUS = ChrF(word_order=2)  # characters and words


@pytest.fixture
def few(demo_pairs, small_vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Samples and references."""
    encoded = [small_vocabulary.encode(target) for _, target in demo_pairs[:16]]
    return np.stack([padded([tokens[1:], tokens[:-3]]) for tokens in encoded]), padded(encoded)


@all_rewards
def test_references_score_one_and_texts_without_characters_zero(reward, few, small_vocabulary):
    _, references = few
    params = reward.init(small_vocabulary)
    nothing = padded([[]] * 16)
    samples = np.stack([references, nothing], axis=1)
    assert (scores(reward, params, samples, references) == [1.0, 0.0]).all()
    assert (scores(reward, params, samples, nothing) == 0.0).all()


def test_passes_over_a_large_batch_change_nothing(few, small_vocabulary, monkeypatch):
    samples, references = few
    params = PLUS.init(small_vocabulary)
    at_once = scores(PLUS, params, samples, references)
    monkeypatch.setattr(lexical, "_CPU_TEXTS", 1)  # 8 devices, so 8 texts: four sources of two samples
    batch = {"samples": samples, "references": references, "sources": references}
    in_passes = jax.jit(lambda params, batch: PLUS.score(params, batch)[PLUS.name])(params, batch)
    np.testing.assert_array_equal(np.asarray(in_passes), at_once)


def test_a_mesh_of_eight_devices_gives_the_same_scores(few, small_vocabulary):
    samples, references = few
    params = PLUS.init(small_vocabulary)
    partitioner = Partitioner(make_mesh(data=8), standard_logical_axis_rules())
    batch = partitioner.put_batch({"samples": samples, "references": references, "sources": references})
    with jax.set_mesh(partitioner.mesh):
        sharded = jax.jit(PLUS.score)(params, batch)[PLUS.name]
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_array_equal(np.asarray(sharded), scores(PLUS, params, samples, references))


@all_rewards
def test_missing_references_are_refused_before_compilation(reward):
    check_reward(reward, has_references=True)
    with pytest.raises(UserError, match=f"{re.escape(reward.name)}.*reference"):
        check_reward(reward, has_references=False)


@pytest.mark.parametrize(
    "arguments", [{"char_order": 0}, {"char_order": 17}, {"beta": 0.0}, {"beta": float("nan")}, {"word_order": -1}]
)
def test_bad_settings_name_the_field(arguments):
    with pytest.raises(UserError, match=f"ChrF.{next(iter(arguments))}"):
        ChrF(**arguments)


def test_bleu_without_an_order_is_refused():
    with pytest.raises(UserError, match="BLEU.max_ngram_order"):
        BLEU(max_ngram_order=0)
