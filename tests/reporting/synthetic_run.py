"""A MODEL_DIR as a run of G = 2, I = 2 with bc_long leaves it, with made-up numbers that hang together."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

NUM_SOURCES, NUM_SAMPLES = 300, 16
# Mean reward, BLEU, chrF, TER and seconds of each policy.
POLICIES = {
    "bc": (0.3541, 20.03, 40.70, 71.2, 61.2),
    "improve_1.1": (0.3702, 20.41, 41.22, 70.1, 48.5),
    "improve_1.2": (0.3779, 20.66, 41.40, 69.7, 47.9),
    "improve_2.1": (0.3868, 20.92, 41.83, 69.2, 48.8),
    "improve_2.2": (0.3921, 20.81, 41.95, 69.0, 48.1),
    "bc_long": (0.3549, 20.11, 40.62, 71.0, 95.3),
}
SENTENCES = (
    ("Siehe, preiset Jehova, alle ihr Knechte Jehovas!", "Look! Praise Yahweh, all you servants of Yahweh!"),
    ("Jehova segne dich von Zion aus, der Himmel und Erde gemacht hat!", "May Yahweh bless you, who made heaven."),
    ("Tom & Mary sagten <nichts>.", 'Tom & Mary said <nothing>, not even "hello".'),
    ("Kannst du mir sagen, wie spät es ist?", "Can you tell me what time it is?"),
    ("Die Veranstaltung wurde wegen des Wetters verschoben.", "Because of the weather the event was postponed."),
)  # fmt: skip


def write_jsonl(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def corrupt(text: str, *, errors: int, generator: np.random.Generator) -> str:
    words = text.split()
    for _ in range(errors):
        at = int(generator.integers(len(words)))
        words[at] = str(generator.choice(["the", "of", "a", "to", "it", "was", "event", "time"]))
    return " ".join(words)


def write_policy(model_dir: Path, name: str, *, mean: float, difficulty: np.ndarray, seed: int) -> float:
    """Writes a policy's samples and translations; returns its mean reward."""
    generator = np.random.default_rng(seed)
    quality = mean + difficulty[:, None] + generator.normal(0, 0.09, (NUM_SOURCES, NUM_SAMPLES))
    rewards = np.clip(quality, 0.01, 1.0).round(5)
    rewards *= mean / rewards.mean()
    errors = round(12 * (0.55 - mean))
    samples, translations = [], []
    for i in range(NUM_SOURCES):
        source, reference = SENTENCES[i % len(SENTENCES)]
        common = {"source_id": i, "source": source, "reference": reference}
        samples.append({**common, "samples": [f"{reference} {j % 13}" for j in range(NUM_SAMPLES)],
                        "rewards": rewards[i].tolist()})  # fmt: skip
        hypothesis = corrupt(reference, errors=errors, generator=generator)
        translations.append({**common, "hypothesis": hypothesis, "reward": float(rewards[i].mean())})
    write_jsonl(model_dir / "eval" / f"{name}.validation.samples.jsonl", samples)
    write_jsonl(model_dir / "eval" / f"{name}.test.jsonl", translations)
    return float(rewards.mean())


def write_grow(model_dir: Path, step: int, *, mean: float, global_threshold: bool) -> dict[str, Any]:
    """Writes a Grow step's statistics; returns its entry in the summary."""
    generator = np.random.default_rng(step)
    rewards = np.clip(generator.beta(3.2, 3.2 * (1 - mean) / mean, 32_000), 0, 0.9999)
    taus = [round(float(np.quantile(rewards, q)), 4) for q in (0.7, 0.85)]
    thresholds = [
        {
            "improve_step": i,
            "description": f"threshold(tau={tau})" if global_threshold else f"top_k(k={5 - i})",
            "tau": tau if global_threshold else None,
            "pairs": int((rewards > tau).sum()),
            "sources": 1_840,
            "references": int((rewards > tau).sum()) // 4,
            "mean_reward": float(rewards[rewards > tau].mean()),
            "learning_rate": 1e-3 / i,
        }
        for i, tau in enumerate(taus, start=1)
    ]
    stats = {
        "count": rewards.size,
        "sources": 2000,
        "distinct": 29_871,
        "kept": 9_480,
        "mean": float(rewards.mean()),
        "variance": float(rewards.var()),
        "histogram": np.histogram(rewards, bins=100, range=(0, 1))[0].tolist(),
        "kept_by_threshold": [int((rewards > t / 100).sum()) for t in range(101)],
        "mean_length": 27.3,
        "hit_eos": 0.9962,
        "zero_variance_sources": 0.004,
        "reference_mean": 1.0,
        "thresholds": thresholds,
    }
    directory = model_dir / f"grow_{step}"
    directory.mkdir(parents=True)
    (directory / "stats.json").write_text(json.dumps(stats))
    return {"name": f"grow_{step}", "samples": 32_000, "distinct": 29_871, "kept": 9_480, "seconds": 38.4 + step}


def write_model_dir(model_dir: Path, *, global_threshold: bool = True) -> Path:
    """Writes the whole MODEL_DIR and returns it."""
    model_dir.mkdir(parents=True, exist_ok=True)
    difficulty = np.random.default_rng(0).normal(0, 0.1, NUM_SOURCES)
    phases, metrics = [], []
    for seed, (name, (mean, bleu, chrf, ter, seconds)) in enumerate(POLICIES.items()):
        reward = write_policy(model_dir, name, mean=mean, difficulty=difficulty, seed=seed)
        if name in ("improve_1.1", "improve_2.1"):
            grow = int(name[len("improve_")])
            phases.append(write_grow(model_dir, grow, mean=mean - 0.01, global_threshold=global_threshold))
        phases.append({"name": name, "reward": reward, "bleu": bleu, "chrf": chrf, "ter": ter, "steps": 120,
                       "samples": 0, "distinct": 0, "kept": 0, "seconds": seconds})  # fmt: skip
        for step in range(10, 121, 10):
            loss = 2.9 - mean - 0.2 * step / 120 + 0.02 * np.sin(step + seed)
            metrics.append({"phase": name, "step": step, "time": 1e9 + step, "loss": loss, "grad_norm": 1.0})
            if step % 40 == 0:
                metrics.append(
                    {"phase": name, "step": step, "time": 1e9, "eval/reward": mean - 0.004 * (120 - step) / 40}
                )
    write_jsonl(model_dir / "metrics.jsonl", metrics)
    comparisons = [
        {"a": "improve_2.2", "b": "bc", "metric": "reward", "difference": 0.0380, "low": 0.0341, "high": 0.0420},
        {"a": "improve_2.2", "b": "bc_long", "metric": "reward", "difference": 0.0372, "low": 0.0330, "high": 0.0411},
        {"a": "improve_2.2", "b": "bc_long", "metric": "chrf", "difference": 1.33, "low": 0.61, "high": 2.02},
        {"a": "bc_long", "b": "bc", "metric": "reward", "difference": 0.0008, "low": -0.0019, "high": 0.0036},
    ]
    summary = {
        "phases": phases,
        "signatures": {
            "bleu": "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0",
            "chrf": "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0",
            "ter": "nrefs:1|case:lc|tok:tercom|norm:no|punct:yes|asian:no|version:2.6.0",
        },
        "config_sha256": "9f2c" * 16,
        "comparisons": comparisons,
        "versions": {"rest_jax": "0.1.0", "jax": "0.10.2", "flax": "0.12.8"},
        "mesh": {"replica": 1, "data": 1, "model": 1},
        "parameters": 1_068_416,
        "task": "demo_de_en",
    }
    (model_dir / "summary.json").write_text(json.dumps(summary))
    (model_dir / "operative_config.gin").write_text(
        "import rest_jax.models\n\n# Parameters for ReST:\nReST.grow_steps = 2\nTASK = 'demo_de_en'\n"
    )
    (model_dir / "run.json").write_text(
        json.dumps(
            {
                "argv": ["rest_jax", "run", "--gin_file=runs/smoke.gin"],
                "hostname": "laptop",
                "devices": ["cpu:0"],
                "start": "2026-11-22 16:59:33",
            }
        )  # fmt: skip
    )
    return model_dir
