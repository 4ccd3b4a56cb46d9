"""Laws of forgetting: forms, fits, predictions, and plans from pilot runs. Loads no models."""
