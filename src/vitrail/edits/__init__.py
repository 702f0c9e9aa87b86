"""Drop-in layers: each edit is a function that takes options and returns a function from model to model."""
