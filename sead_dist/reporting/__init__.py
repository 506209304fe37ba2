"""Model card, plots and tables of a run."""
