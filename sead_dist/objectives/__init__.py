"""Ensembles, losses and feature losses.

Others use `make_ensemble`, `DistillationLoss`, `register_loss`, `register_ensemble`.
"""
