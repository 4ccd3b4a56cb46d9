"""What a model can do beside predicting text, base against tuned: each module measures one capability."""
