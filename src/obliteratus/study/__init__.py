"""Ablation studies: knock a part out by a live edit, see what breaks, put it back."""
