"""Adapters for programs that people fill photos with; each imports its host when it is used."""
