"""A model writes its own replay rows."""
