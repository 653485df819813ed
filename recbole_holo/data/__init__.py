"""Data: whole sequences, item attributes, and batches."""

TARGETS_SUFFIX = "_target"  # <item_id>_target [B, L]: the next item where it is a training target, 0 elsewhere
GAPS = "gap_list"  # [B, L]: the bucket of the time before each event, where a model reads it (event_time)
