"""Operators and blocks that several models share."""
