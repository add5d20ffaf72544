"""Hyperparameter search."""

STUDY_FILE = "study.db"
"""In a search's folder: the study's database."""
