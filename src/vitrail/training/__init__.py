"""Recipes, optimisers, schedules and the training loop."""
