"""Modelling files that a thinking export carries: they need torch and transformers, and nothing of this project."""
