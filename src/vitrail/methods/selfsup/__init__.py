"""Objectives that need no labels."""
