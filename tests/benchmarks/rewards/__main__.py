"""Exactness and cost of rewards, each part beside the library that it must equal.

    python -m tests.benchmarks.rewards                             lexical, then learned
    python -m tests.benchmarks.rewards lexical [--pairs FILE]      chrF, chrF++ and BLEU beside sacreBLEU
    python -m tests.benchmarks.rewards learned [--peer torch]      MetricX beside PyTorch, static embeddings
    python -m tests.benchmarks.rewards retokenization --vocabulary FILE --pairs FILE...     beside sentencepiece

--help after a part's name says more.
"""

import sys

from tests.benchmarks.rewards import learned, lexical, retokenization

PARTS = {"lexical": lexical.main, "learned": learned.main, "retokenization": retokenization.main}


def main(arguments: list[str]) -> None:
    if not arguments:
        lexical.main([])
        learned.main([])
    elif arguments[0] in PARTS:
        PARTS[arguments[0]](arguments[1:])
    else:
        print(__doc__, file=sys.stderr)
        raise SystemExit(0 if arguments[0] in ("-h", "--help") else 2)


if __name__ == "__main__":
    main(sys.argv[1:])
