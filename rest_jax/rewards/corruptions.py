"""Translations made bad on purpose: what a learned reward is trained against, and what any reward is audited with.

The kinds follow the synthetic failures of MetricX-24 (arXiv 2410.03983) and those that the authors of ReST tried their
reward on. Everything is text on the host. A unit is a word, or a character where a text is written without spaces.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

# (sources, translations, random generator) -> one variant of each translation. The texts of one list are of one
# language; a variant may equal its translation where the text is too short to be spoilt that way.
Corruption = Callable[[Sequence[str], Sequence[str], np.random.Generator], list[str]]


def repeated(sources: Sequence[str], translations: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Over-translation: the last part, a fifth to all of the text, stands there one to three times more."""
    del sources

    def corrupt(units: list[str]) -> list[str]:
        tail = units[len(units) - _share_of(units, min(rng.uniform(0.2, 1.4), 1.0)) :]
        return units + tail * int(rng.integers(1, 4))

    return [_on_units(text, corrupt) for text in translations]


def truncated(sources: Sequence[str], translations: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Under-translation: the first 20 to 80 % of the text."""
    del sources
    return [
        _on_units(text, lambda units: units[: _share_of(units, rng.uniform(0.2, 0.8))] if len(units) > 1 else units)
        for text in translations
    ]


def with_omissions(sources: Sequence[str], translations: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Under-translation: 20 to 80 % of the units are left out, anywhere."""
    del sources

    def corrupt(units: list[str]) -> list[str]:
        if len(units) < 2:
            return units
        kept = rng.choice(len(units), _share_of(units, rng.uniform(0.2, 0.8)), replace=False)
        return [units[place] for place in sorted(kept)]

    return [_on_units(text, corrupt) for text in translations]


def permuted(sources: Sequence[str], translations: Sequence[str], rng: np.random.Generator) -> list[str]:
    """All units, in another order."""
    del sources

    def corrupt(units: list[str]) -> list[str]:
        if len(set(units)) < 2:
            return units
        shuffled = list(rng.permutation(np.asarray(units, object)))
        return shuffled if shuffled != units else shuffled[1:] + shuffled[:1]

    return [_on_units(text, corrupt) for text in translations]


def copied_source(sources: Sequence[str], translations: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The source, as it is."""
    del translations, rng
    return list(sources)


def half_untranslated(sources: Sequence[str], translations: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The first half of the translation, then the second half of the source."""
    del rng
    return [
        " ".join(
            (
                _on_units(text, lambda units: units[: (len(units) + 1) // 2]),
                _on_units(source, lambda units: units[(len(units) + 1) // 2 :]),
            )
        )
        for source, text in zip(sources, translations, strict=True)
    ]


def unrelated(sources: Sequence[str], translations: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Fluent, but the translation of another source: the next longer one that is not the same text."""
    del sources
    # Each is given the next other text in the order of length; shuffled first, so that equal lengths are at random.
    shuffled = rng.permutation(len(translations))
    order = shuffled[np.argsort([len(translations[k]) for k in shuffled], kind="stable")]
    variants = list(translations)
    for place, k in enumerate(order):
        others = (translations[order[(place + step) % len(order)]] for step in range(1, len(order)))
        variants[k] = next((text for text in others if text != translations[k]), translations[k])
    return variants


def gibberish(sources: Sequence[str], translations: Sequence[str], rng: np.random.Generator) -> list[str]:
    """As many units as the translation has, drawn at random from those of all translations."""
    del sources
    pool = [unit for text in translations for unit in _units(text)]
    return [_on_units(text, lambda units: [pool[rng.integers(len(pool))] for _ in units]) for text in translations]


def empty(sources: Sequence[str], translations: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Nothing."""
    del sources, rng
    return [""] * len(translations)


def other_source(sources: Sequence[str], translations: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Fluent and in the wrong language, the sources': another source than the one to translate."""
    del translations
    return unrelated(sources, sources, rng)


def in_language_of(texts: Sequence[str]) -> Corruption:
    """Fluent and in the wrong language, that of `texts`: one of them for each translation, of about its length."""

    def corrupt(sources: Sequence[str], translations: Sequence[str], rng: np.random.Generator) -> list[str]:
        del sources
        chosen = rng.choice(len(texts), len(translations), replace=len(texts) < len(translations))
        by_length = sorted((texts[k] for k in chosen), key=len)
        variants = list(translations)
        for text, k in zip(by_length, np.argsort([len(text) for text in translations], kind="stable"), strict=True):
            variants[k] = text
        return variants

    return corrupt


CORRUPTIONS: Mapping[str, Corruption] = {
    "repeated": repeated,
    "truncated": truncated,
    "with_omissions": with_omissions,
    "permuted": permuted,
    "copied_source": copied_source,
    "half_untranslated": half_untranslated,
    "unrelated": unrelated,
    "gibberish": gibberish,
    "empty": empty,
}


def length_agreement(text: str, other: str) -> float:
    """Units of the shorter text by units of the longer one: 0 to 1, and 1 for two empty texts."""
    lengths = sorted((len(_units(text)), len(_units(other))))
    return lengths[0] / lengths[1] if lengths[1] else 1.0


def _units(text: str) -> list[str]:
    """Words; characters of a text that has no space inside."""
    words = text.split()
    return words if len(words) > 1 else list(text.strip())


def _joiner(text: str) -> str:
    return " " if len(text.split()) > 1 else ""


def _on_units(text: str, corrupt: Callable[[list[str]], list[str]]) -> str:
    return _joiner(text).join(corrupt(_units(text)))


def _share_of(units: list[str], share: float) -> int:
    """At least one unit of several, and where it is a share below 1 not all of them."""
    return max(1, min(round(share * len(units)), len(units) - 1)) if share < 1 else len(units)
