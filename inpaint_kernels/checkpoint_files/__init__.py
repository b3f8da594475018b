"""Readers of the files that published weights come in."""
