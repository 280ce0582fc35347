"""TUNE: a plan fitted by gradients on live edits."""
