"""Distillation: from a teacher, or from the student itself."""
