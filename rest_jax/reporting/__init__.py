"""What a run shows: the progress line, metrics.jsonl and TensorBoard, the table and report.html."""
