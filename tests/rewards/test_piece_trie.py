"""The double-array trie against a dictionary."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.rewards.piece_trie import DEAD, Trie, build_trie

WORDS = st.text(alphabet=st.sampled_from("abcdé好\U0001f642"), min_size=1, max_size=5)
ASKED = st.text(alphabet=st.sampled_from("abcdé好\U0001f642zÿ"), min_size=1, max_size=6)


@jax.jit
def walk(trie: Trie, codes: jax.Array) -> jax.Array:
    """Values after each character, -2 where no string goes on so: `[length]`."""

    def step(state, code):
        nodes, bases = trie.step(*state, trie.classes_of(code[None]))
        return (nodes, bases), jnp.where(nodes >= 0, trie.values[nodes], DEAD)[0]

    return jax.lax.scan(step, trie.start((1,)), codes)[1]


@given(st.sets(WORDS, max_size=60), st.lists(ASKED, min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_walks_find_the_strings_and_no_others(words, asked):
    strings = sorted(words)
    # Arrays of one size, so that one program serves all examples.
    trie = Trie(
        *(
            jnp.pad(array, (0, size - len(array)), constant_values=fill)
            for array, size, fill in zip(build_trie(strings), (0x20000, 2048, 2048, 2048), (0, 0, -1, -1), strict=True)
        )
    )
    for text in [*asked, *strings[:5]]:
        codes = np.zeros(6, np.int32)
        codes[: len(text)] = [ord(character) for character in text]
        for length, value in enumerate(np.asarray(walk(trie, jnp.asarray(codes)))[: len(text)], start=1):
            prefix = text[:length]
            is_prefix = any(string.startswith(prefix) for string in strings)
            assert value == (strings.index(prefix) if prefix in words else -1 if is_prefix else DEAD), prefix


def test_many_strings_lie_close_together():
    rng = np.random.default_rng(0)
    strings = sorted({"".join(chr(97 + code) for code in rng.geometric(0.2, rng.integers(1, 9))) for _ in range(5000)})
    trie = build_trie(strings)
    assert sorted(int(value) for value in np.asarray(trie.values) if value >= 0) == list(range(len(strings)))
    nodes = len({string[:length] for string in strings for length in range(1, len(string) + 1)})
    assert len(trie.bases) < 1.2 * nodes
