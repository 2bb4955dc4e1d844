"""Crosses between the features of one ranking input."""
