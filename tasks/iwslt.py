"""IWSLT TED talks: `iwslt14_{source}_{target}` and `iwslt17_{source}_{target}`, both directions, splits train,
validation and test.

TFDS has neither, so the text is read from a folder (see `corpus_folder`): train.*, valid.* and, for 2014, test.*. That
is the layout that fairseq's `prepare-iwslt14.sh` writes; take its text before BPE, and with its case, since rest_jax
learns pieces itself. The test split of 2017 is sacreBLEU's (tst2017), downloaded at the first use.
"""

from rest_jax.tasks import corpus_folder, parallel_text, text_sources

_PAIRS = {
    "iwslt14": [
        (language, "en")
        for language in ("ar", "de", "es", "fa", "fr", "he", "it", "nl", "pl", "ro", "ru", "sl", "tr", "zh")
    ],
    "iwslt17": [(language, "en") for language in ("ar", "de", "fr", "ja", "ko", "zh")],
}


def _register(corpus: str, languages: tuple[str, str]) -> None:
    for source, target in (languages, languages[::-1]):
        splits: dict[str, text_sources.TextSplit] = {
            split: corpus_folder.split(corpus, languages, name=name, source=source, target=target)
            for split, name in (("train", "train"), ("validation", "valid"), ("test", "test"))
        }
        if corpus == "iwslt17":
            splits["test"] = text_sources.SacrebleuTestSet(corpus, f"{source}-{target}")
        parallel_text.register_translation(
            f"{corpus}_{source}_{target}", splits=splits, vocabulary=corpus_folder.vocabulary(corpus, languages)
        )


for _corpus, _pairs in _PAIRS.items():
    for _languages in _pairs:
        _register(_corpus, _languages)
