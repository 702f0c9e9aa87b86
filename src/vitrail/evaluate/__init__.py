"""What a model is worth on held-out data: metrics, calibration, corruptions, explanations. All on arrays."""
