"""Rows that are trained on again: on disk, verified, with what the base predicted there."""
