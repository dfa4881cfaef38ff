"""A double-array trie of strings (Aoe 1989), built on the host and walked in the graph.

A child of the node in slot s, on a character of class c, lies in slot bases[s] + c, if parents[bases[s] + c] == s. So a
step is two gathers and an exact comparison: nothing is hashed, and a walk never ends at a string that is not there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The node of a walk that has left the trie; no slot has this parent.
DEAD = -2
_EMPTY = -1
_ROOT = 0
# Free slots that are tried at once for a node.
_CANDIDATES = 512


class Trie(NamedTuple):
    """Nodes are slots; the root is slot 0.

    Attributes:
      classes: int32 `[code_points]`, class of each character; 0 of those in no string, as of code points past the end.
      bases: int32 `[slots]`.
      parents: int32 `[slots]`, a slot, or -1 of an empty one.
      values: int32 `[slots]`, the number of the string that ends here, or -1.
    """

    classes: jax.Array
    bases: jax.Array
    parents: jax.Array
    values: jax.Array

    def classes_of(self, codes: jax.Array) -> jax.Array:
        """Classes of code points, int32 of any shape."""
        return jnp.take(self.classes, codes, mode="fill", fill_value=0)

    def start(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """(nodes, their bases), int32 of `shape`, of walks that begin."""
        return jnp.full(shape, _ROOT, jnp.int32), jnp.broadcast_to(self.bases[_ROOT], shape)

    def step(self, nodes: jax.Array, bases: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(nodes, their bases) after one more character; `DEAD` where no string goes on so."""
        slots = bases + classes
        child = self.parents[slots] == nodes
        return jnp.where(child, slots, DEAD), jnp.where(child, self.bases[slots], 0)


def build_trie(strings: Sequence[str]) -> Trie:
    """The trie of distinct non-empty `strings`, numbered in order."""
    parents_of, classes_of, first_children, values_of, classes = _nodes(strings)
    num_classes = int(classes.max(initial=0)) + 1
    slots, bases = _place(parents_of, classes_of, first_children, num_classes=num_classes)
    size = int(bases.max(initial=0)) + num_classes
    table_bases, table_parents = np.zeros(size, np.int32), np.full(size, _EMPTY, np.int32)
    table_values = np.full(size, -1, np.int32)
    table_bases[slots] = bases
    table_values[slots] = values_of
    table_parents[slots[1:]] = slots[parents_of[1:]]
    return Trie(
        classes=jnp.asarray(classes),
        bases=jnp.asarray(table_bases),
        parents=jnp.asarray(table_parents),
        values=jnp.asarray(table_values),
    )


def _nodes(strings: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Nodes of the trie, level by level, children of one node beside each other.

    Returns:
      Per node its parent, its class, its first child (children end where the next node's begin; one entry more than
      nodes) and its value; and the class of each code point.
    """
    # [strings, longest]: numpy's strings are arrays of code points, 0 behind the end.
    codes = np.asarray(strings, np.str_).reshape(len(strings), 1).view(np.uint32) if strings else np.zeros((0, 1), int)
    lengths = np.asarray([len(string) for string in strings], np.int64)
    inside = np.arange(codes.shape[1]) < lengths[:, None]
    found, counts = np.unique(codes[inside], return_counts=True)
    classes = np.zeros(int(found.max(initial=0)) + 1, np.int32)
    # Frequent characters have small classes, so that children lie close together.
    classes[found[np.argsort(-counts, kind="stable")]] = np.arange(1, len(found) + 1)
    node_of = np.zeros(len(strings), np.int64)  # where each string's walk stands
    parents, node_classes, values = [np.asarray([_EMPTY])], [np.asarray([0])], [np.asarray([-1])]
    num_nodes = 1
    for depth in range(int(lengths.max(initial=0))):
        going = np.flatnonzero(lengths > depth)
        class_of = classes[codes[going, depth]].astype(np.int64)
        edges, child = np.unique(node_of[going] * len(classes) + class_of, return_inverse=True)
        node_of[going] = num_nodes + child
        level_values = np.full(len(edges), -1)
        ending = going[lengths[going] == depth + 1]
        level_values[node_of[ending] - num_nodes] = ending
        parents.append(edges // len(classes))
        node_classes.append(edges % len(classes))
        values.append(level_values)
        num_nodes += len(edges)
    parent = np.concatenate(parents)
    first_children = np.searchsorted(parent, np.arange(num_nodes + 1))  # parents ascend, level by level
    return parent, np.concatenate(node_classes), first_children, np.concatenate(values), classes


def _place(
    parents: np.ndarray, classes: np.ndarray, first_children: np.ndarray, *, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """(slot, base) of each node, such that no two children share a slot."""
    num_nodes = len(parents)
    slots, bases = np.zeros(num_nodes, np.int64), np.zeros(num_nodes, np.int64)
    counts = np.diff(first_children)
    taken = np.zeros(2 * (num_nodes + num_classes) + _CANDIDATES, np.bool_)
    taken[_ROOT] = True
    low = 0
    several = np.flatnonzero(counts > 1)
    # Nodes of many children first, each where it fits first. Places that were too full for one are not tried again.
    for node in several[np.argsort(-counts[several], kind="stable")]:
        children = slice(first_children[node], first_children[node + 1])
        offsets = np.sort(classes[children])
        while True:
            if low + _CANDIDATES + num_classes > len(taken):
                taken = np.concatenate([taken, np.zeros(len(taken), np.bool_)])
            candidates = low + np.flatnonzero(~taken[low + offsets[0] : low + offsets[0] + _CANDIDATES])
            fits = ~taken[candidates[:, None] + offsets].any(axis=1)
            if fits.any():
                break
            low += _CANDIDATES
        base = candidates[np.argmax(fits)]
        bases[node] = base
        slots[children] = base + classes[children]
        taken[slots[children]] = True
    # An only child goes to any free slot from where its parent's base is not below 0.
    single = np.flatnonzero(counts == 1)
    child = first_children[single]
    taken = np.concatenate([taken, np.zeros(num_nodes, np.bool_)])
    free = num_classes + np.flatnonzero(~taken[num_classes:])[: len(single)]
    slots[child] = free
    bases[single] = free - classes[child]
    return slots, bases
