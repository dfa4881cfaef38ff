"""WMT news translation: `wmt{14,16,19,20}_{source}_{target}`, both directions, splits train, validation and test.

| task | train | validation | test |
|---|---|---|---|
| wmt14_* | TFDS | TFDS (newstest2013; newsdev2014 for hi) | TFDS (newstest2014) |
| wmt16_* | TFDS | TFDS (newstest2015, newsdev2016 for ro and tr) | TFDS (newstest2016) |
| wmt19_* | TFDS | TFDS (newstest2018; newsdev2019 for gu, kk, lt; euelections for fr) | sacreBLEU (newstest2019) + |
| wmt20_* | folder | folder | sacreBLEU (newstest2020): TFDS has no WMT 2020 |

+ Where that direction was in the campaign of 2019.

The folder, and where each pair's vocabulary is expected: `corpus_folder`. Nothing is read or downloaded before a split
is used.
"""

from sacrebleu.dataset import DATASETS

from rest_jax.tasks import corpus_folder, parallel_text, text_sources

# Language pairs as TFDS has them, and for 2020 as sacreBLEU does; the folder's name has them in this order.
_TFDS_PAIRS = {
    "wmt14": [(language, "en") for language in ("cs", "de", "fr", "hi", "ru")],
    "wmt16": [(language, "en") for language in ("cs", "de", "fi", "ro", "ru", "tr")],
    "wmt19": [*((language, "en") for language in ("cs", "de", "fi", "gu", "kk", "lt", "ru", "zh")), ("fr", "de")],
}
_WMT20_PAIRS = [
    *((language, "en") for language in ("cs", "de", "iu", "ja", "km", "pl", "ps", "ru", "ta", "zh")),
    ("fr", "de"),
]
_TFDS_VERSION = "1.0.0"


def _register(corpus: str, languages: tuple[str, str]) -> None:
    for source, target in (languages, languages[::-1]):
        splits: dict[str, text_sources.TextSplit] = {}
        for split in ("train", "validation", "test"):
            if corpus in _TFDS_PAIRS and not (corpus == "wmt19" and split == "test"):
                tfds_name = f"{corpus}_translate/{'-'.join(languages)}:{_TFDS_VERSION}"
                splits[split] = text_sources.TfdsSplit(tfds_name, split, source, target)
            elif split != "test":
                name = "valid" if split == "validation" else split
                splits[split] = corpus_folder.split(corpus, languages, name=name, source=source, target=target)
            elif f"{source}-{target}" in DATASETS[corpus].langpairs:
                splits[split] = text_sources.SacrebleuTestSet(corpus, f"{source}-{target}")
        parallel_text.register_translation(
            f"{corpus}_{source}_{target}", splits=splits, vocabulary=corpus_folder.vocabulary(corpus, languages)
        )


for _corpus, _pairs in {**_TFDS_PAIRS, "wmt20": _WMT20_PAIRS}.items():
    for _languages in _pairs:
        _register(_corpus, _languages)
