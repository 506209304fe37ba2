"""Ensembles, losses and feature losses."""
