"""Figures and tables from result JSON; never from a model."""
