"""A run: from its settings to its last checkpoint.

start        settings from the command line or a checkpoint, the run's folder, its start
trainer      one training step, and what a checkpoint keeps of it
loop         train, log, evaluate, sample, save; stop when asked
distributed  one run in many processes
log          metrics.jsonl, the loss curve, TensorBoard, run.json
"""
