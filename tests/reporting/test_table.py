from rest_jax.reporting.table import format_table, phase_rows

SUMMARY = {
    "phases": [
        {"name": "bc", "reward": 0.3541, "bleu": 20.034, "chrf": 40.7, "samples": 0, "kept": 0, "seconds": 61.2},
        {"name": "grow_1", "samples": 32_000, "distinct": 29_871, "kept": 9_480, "seconds": 3700},
        {"name": "improve_1.1", "reward": 0.37021, "bleu": 20.4, "chrf": 41.22, "samples": 0, "seconds": 48},
    ],
    "comparisons": [
        {"a": "improve_1.1", "b": "bc", "metric": "reward", "difference": 0.016, "low": 0.012, "high": 0.02},
        {"a": "improve_1.1", "b": "bc", "metric": "chrf", "difference": 0.52, "low": -0.1, "high": 1.1},
    ],
    "signatures": {"bleu": "nrefs:1"},
}


def test_the_table():
    assert format_table(SUMMARY).splitlines() == [
        "phase        reward   BLEU   chrF  samples  distinct   kept   time",
        "-----------  ------  -----  -----  -------  --------  -----  -----",
        "bc           0.3541  20.03  40.70        -         -      -  1m01s",
        "grow_1            -      -      -   32,000    29,871  9,480  1h01m",
        "improve_1.1  0.3702  20.40  41.22        -         -      -    48s",
        "",
        "95 % interval, paired bootstrap by source:",
        "  improve_1.1 - bc: reward +0.0160 [+0.0120, +0.0200] (significant)",
        "  improve_1.1 - bc: chrf +0.52 [-0.10, +1.10] (not significant)",
        "",
        "bleu: nrefs:1",
    ]


def test_a_reward_of_zero_is_a_result_not_a_gap():
    _, rows = phase_rows([{"name": "bc", "reward": 0.0, "bleu": 0.0}])
    assert rows == [["bc", "0.0000", "0.00"]]


def test_a_run_that_has_measured_nothing_yet():
    assert format_table({"phases": []}).splitlines()[0].strip() == "phase"
