"""Speed of sampling N translations of each source, beside the libraries that people use and the machine's limit.

    python -m tests.benchmarks.sampling --model t5_1_1_small --sources 8 --samples 32 --source_length 64 \\
        --target_length 64 [--real_lengths] [--peers t5x,transformers,ctranslate2] --json FILE

Every engine draws from the same random weights (weights.py), the whole vocabulary, at the same temperature; by
default no sample ends before --target_length, with --real_lengths they end as the demo's sentences do. Counted are
tokens before EOS. Engines run in processes of their own (engines.py), one at a time and in turn within each
round; the median counts, and ratios are those of the same round. What is compiled or loaded is not counted.

That all have the same weights is looked at: greedily, each engine must find our tokens with our log-probabilities.

The limit is the best rate of a matrix product measured in the same run, divided by what a token needs. With D emb_dim,
A = heads x head_dim, F mlp_dim, V vocabulary, S the source's and n the sample's length with EOS, that is for a sample

    decoder layer   n (8 D A + 6 D F + 4 D A + 4 A S) + 4 A n (n + 1) / 2
    logits          2 n D V

and once for its source, shared by N samples, (8 D A + 6 D F) S + 4 A S S a layer of the encoder and 4 D A S a layer of
the decoder, its cross-attention's keys and values (6 D F for a gated feed-forward layer, 4 D F for a plain one).

Of ours alone: --scaling (time per token from 1,000 to 100,000 samples), --memory (what the decode loop holds of
the sources, N = 1, 32, 256) and --compile (seconds); see growth.py.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.sampling import growth
from tests.benchmarks.sampling.compare import PEERS, compare, report
from tests.benchmarks.sampling.engines import PACKAGES
from tests.benchmarks.sampling.setting import Setting, benchmark_model


def chosen_peers(text: str | None) -> list[str]:
    """The peers that were named, or those that can be imported."""
    if text is None:
        names = []
        for name in PEERS:
            package, how = PACKAGES[name]
            if importlib.util.find_spec(package) is None:
                print(f"{name}: {package} is not installed ({how})", file=sys.stderr)
            else:
                names.append(name)
        return names
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in PEERS:
            raise SystemExit(f"--peers: {name!r} is none of {', '.join(PEERS)}.")
        package, how = PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise SystemExit(f"--peers: {name} needs {package}, which is not installed: {how}.")
    return names


def _field(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, int(value) if value.lstrip("-").isdigit() else value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Setting.model, help="a file of gin/models (default %(default)s)")
    for name in ("sources", "samples", "source_length", "target_length", "rounds", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Setting, name), help="default %(default)s")
    parser.add_argument("--real_lengths", action="store_true", help="samples end as the demo's sentences do")
    parser.add_argument("--temperature", type=float, default=Setting.temperature, help="default %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=Setting.dtype)
    parser.add_argument(
        "--sampling", type=_field, action="append", default=[], metavar="FIELD=VALUE",
        help="a field of rest_jax's Sampling that is not as it comes",
    )  # fmt: skip
    parser.add_argument(
        "--peers", help=f"of {', '.join(PEERS)}, comma-separated; '' for none (default: all that can be imported)"
    )
    parser.add_argument("--scaling", action="store_true", help="of ours alone: time per token as samples grow")
    parser.add_argument("--memory", action="store_true", help="of ours alone: memory of a source as samples grow")
    parser.add_argument("--compile", action="store_true", help="of ours alone: seconds to compile")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = vars(parser.parse_args(arguments))
    setting = Setting(
        **{field.name: options[field.name] for field in dataclasses.fields(Setting) if field.name != "sampling"},
        sampling=tuple(options["sampling"]),
    )
    modes = {
        "scaling": growth.scaling,
        "memory": growth.memory,
        "compile": growth.compile_time,
    }
    if chosen := [name for name in modes if options[name]]:
        model = benchmark_model(setting.model, dtype=setting.dtype)
        result: dict[str, Any] = {**dataclasses.asdict(setting)}
        for name in chosen:
            result[name] = modes[name](setting, model)
            print("\n".join(result[name]["lines"]), flush=True)
    else:
        result = compare(setting, peers=chosen_peers(options["peers"]))
        print("\n".join(report(result)))
    if options["json"]:
        options["json"].write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
