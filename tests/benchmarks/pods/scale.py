"""The paper's data sets on pods, worked out from the compile table.

    python -m tests.benchmarks.pods.scale --json build/pods.json --model madlad400_10b

Grow makes a data set's samples once; Improve trains on those that pass the filter. Every number but the data sets'
sizes, the models' and the constants below comes from the table's file.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tests.benchmarks.pods.__main__ import MODELS, compiled

# Samples of a Grow step (Gulcehre et al. 2023, Table 1 and section 4), and their sources.
DATA_SETS = {"IWSLT 2014 De-En": (16e6, 100), "WMT 2020 Zh-En": (890e6, 25), "Web domain En-Zh": (3e6, 1000)}
MEAN_LENGTH = 40  # tokens of a sentence
KEPT, STEPS = 0.1, 4  # the share that passes, and Improve steps, each one pass over it
UTILISATION = 0.87  # slot-steps that made a token: docs/performance.md, lengths of real sentences
# Of a stored sample: tokens as int32, its numbers, and a source's rewards.
ROW_BYTES = 4 * MEAN_LENGTH + 64
CHECKPOINT_RATE = 1e9  # bytes/s that one host writes to object storage; an assumption


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--model", required=True, choices=MODELS)
    parser.add_argument("--scale", default="slice")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.json.read_text())
    print(
        "| data set | chips | Grow, chip-hours | Improve, chip-hours | kept, GB | read, MB/s | checkpoint, s | most |"
    )
    print("|---" * 8 + "|")
    for chip in ("v5e", "v5p", "v6e"):
        rows = [compiled(found, options.model, chip, options.scale, phase) for phase in ("grow", "improve")]
        if any(row is None or not row["fits"] for row in rows):
            continue
        for name, (samples, per_source) in DATA_SETS.items():
            print(
                row_of(
                    name, chip, samples, per_source, grow=rows[0], improve=rows[1], parameters=MODELS[options.model][1]
                )
            )


def row_of(name: str, chip: str, samples: float, per_source: int, *, grow: Any, improve: Any, parameters: float) -> str:
    """A data set on the topology of two rows of the table."""
    devices = grow["devices"]
    growing, improving = grow["programs"][0], improve["programs"][0]
    grow_seconds = samples * MEAN_LENGTH / UTILISATION / growing["tokens_per_second"]
    improve_seconds = STEPS * KEPT * samples * MEAN_LENGTH / improving["tokens_per_second"]
    sources_rate = samples / per_source * MEAN_LENGTH * 4 / grow_seconds
    # Parameters and Adafactor's factored moments: 4 bytes a parameter and little more.
    hosts = max(devices // 4, 1)
    checkpoint = 4 * parameters / hosts / CHECKPOINT_RATE
    cells = [
        name,
        f"{devices} {chip}",
        f"{grow_seconds * devices / 3600:,.1f}",
        f"{improve_seconds * devices / 3600:,.1f}",
        f"{KEPT * samples * ROW_BYTES / 1e9:,.1f}",
        f"{sources_rate / 1e6:,.2f}",
        f"{checkpoint:.1f}",
        "Grow" if grow_seconds > improve_seconds else "Improve",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
