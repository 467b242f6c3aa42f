"""The stages of a run; they know the order of things."""
