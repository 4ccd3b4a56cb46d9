"""The laboratory: small models, languages of known entropy, digit tasks and pretraining, to check the science on."""
