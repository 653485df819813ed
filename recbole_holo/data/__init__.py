"""Data: whole sequences, item attributes, and batches."""

TARGETS_SUFFIX = "_target"  # <item_id>_target [B, L]: the next item where it is a training target, 0 elsewhere
