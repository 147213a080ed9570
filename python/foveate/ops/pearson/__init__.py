"""Pearson correlation between the units of two networks (Rosetta Neurons, ICCV 2023)."""
