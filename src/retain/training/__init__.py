"""Replay and retention inside the user's own trainer."""
