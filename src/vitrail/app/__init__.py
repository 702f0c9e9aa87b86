"""The use cases: fit, audit, predict, evaluate, export."""
