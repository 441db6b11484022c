"""Smaller shapes: width and depth cut out of a model, so that an ordinary, smaller checkpoint comes out."""
