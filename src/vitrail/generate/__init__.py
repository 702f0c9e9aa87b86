"""Models that generate images, and how they are trained."""
