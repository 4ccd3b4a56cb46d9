"""Studies of forgetting: `python -m experiments` lists them."""
