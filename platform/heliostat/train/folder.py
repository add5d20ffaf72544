"""What the files and folders in a run's folder are called; metrics.jsonl is in `heliostat.curves`."""

STOP_FILE = "stop"
OUTCOME_FILE = "outcome.json"
BUNDLE = "bundle"
LEDGER = "ledger"
STACKS = "stacks"
CHECKPOINT_FAULTS_FILE = "checkpoint_faults.jsonl"
"""Checkpoints that were not to be had: step, what (rejected or missed), reason."""
