"""A small model of static embeddings in model2vec's layout, in which words of two languages share a vector."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from rest_jax.checkpoints import safetensors_files
from rest_jax.checkpoints.tensors import of_array

# Words of both languages share a vector; "the" and "die" weigh nothing.
MEANINGS = {"Himmel": 0, "heaven": 0, "Erde": 1, "earth": 1, "Wasser": 2, "water": 2, "the": 3, "die": 3}


def write_model(folder: Path, *, shared: bool) -> tuple[Any, np.ndarray]:
    """Tokens are words, or letters where there is no word; `shared` writes each vector once, with weights apart."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    spelled = ["[unk]", *(f"▁{word}" for word in MEANINGS), "▁", *letters, *letters.upper()]
    # As XLM-R's tokenizer: a unigram model, ▁ for spaces and in front.
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.Unigram([(token, -1.0 if len(token) > 1 else -10.0) for token in spelled], unk_id=0)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(0)
    of_meaning, of_letter = rng.normal(size=(4, 16)), 0.05 * rng.normal(size=(len(spelled), 16))
    mapping = [4 + i if (word := token[1:]) not in MEANINGS else MEANINGS[word] for i, token in enumerate(spelled)]
    weights = np.asarray([0.0 if token in ("▁the", "▁die") else 0.5 for token in spelled], np.float32)
    rows = np.concatenate([of_meaning, of_letter]).astype(np.float32)
    if shared:
        arrays = {"embeddings": rows, "mapping": np.asarray(mapping), "weights": weights}
    else:
        arrays = {"embeddings": rows[mapping] * weights[:, None]}
    safetensors_files.write_tensors(folder / "model.safetensors", {name: of_array(a) for name, a in arrays.items()})
    (folder / "config.json").write_text(json.dumps({"model_type": "model2vec", "normalize": True}))
    return tokenizer, rows[mapping] * weights[:, None]
