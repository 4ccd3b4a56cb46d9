"""Models as they are loaded, the frozen base among them, and the proof that it is the base."""
