import json

import numpy as np

from rest_jax.reporting.metrics_writer import MetricsWriter, read_metrics


def write_steps(writer, phase, steps):
    for step in steps:
        writer.write(phase=phase, step=step, scalars={"loss": np.float32(step)})


def steps_of(model_dir, phase):
    return [line["step"] for line in read_metrics(model_dir) if line["phase"] == phase]


def test_lines_are_strict_json_with_plain_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(phase="bc", step=np.int64(3), scalars={"loss": np.float32(0.5), "grad_norm": float("inf")})

    def refuse(constant):
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line.pop("time") > 1e9
    assert line == {"phase": "bc", "step": 3, "loss": 0.5, "grad_norm": None}


def test_resuming_leaves_each_step_once_and_other_phases_alone(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        write_steps(writer, "bc", [10, 20, 30])
        write_steps(writer, "improve_1.1", [10, 20, 30])
    with MetricsWriter(tmp_path) as writer:
        writer.resume(phase="improve_1.1", step=20)
        write_steps(writer, "improve_1.1", [30, 40])
    assert steps_of(tmp_path, "bc") == [10, 20, 30]
    assert steps_of(tmp_path, "improve_1.1") == [10, 20, 30, 40]


def test_a_line_cut_off_by_a_crash_is_dropped_and_does_not_spoil_the_next(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        write_steps(writer, "bc", [10])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "bc", "st')
    assert steps_of(tmp_path, "bc") == [10]
    with MetricsWriter(tmp_path) as writer:
        writer.resume(phase="bc", step=10)
        write_steps(writer, "bc", [20])
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [10, 20]


def test_tensorboard_has_a_run_per_phase_with_the_values(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with MetricsWriter(tmp_path) as writer:
        write_steps(writer, "bc", [10, 20])
        write_steps(writer, "bc_long", [5])
    values = {}
    for phase in ("bc", "bc_long"):
        (path,) = (tmp_path / "tensorboard" / phase).iterdir()
        data, at = path.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its checksum, the event, its checksum.
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                values[phase, value.tag, event.step] = value.simple_value
    assert values == {("bc", "loss", 10): 10.0, ("bc", "loss", 20): 20.0, ("bc_long", "loss", 5): 5.0}


def test_a_disabled_writer_leaves_no_trace(tmp_path):
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.resume(phase="bc", step=0)
        write_steps(writer, "bc", [10])
    assert not (tmp_path / "run").exists()


def test_a_fresh_run_has_no_metrics_to_drop(tmp_path):
    MetricsWriter(tmp_path).resume(phase="bc", step=-1)
    assert read_metrics(tmp_path) == []
