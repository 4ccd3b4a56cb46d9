"""How much a tuned model forgot of its base: texts, choices, refusals, generations."""
