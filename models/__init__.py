"""Models and methods built on the public ops."""
