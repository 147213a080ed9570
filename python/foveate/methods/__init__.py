"""Whole methods assembled from the ops; each is a module that loads on first use."""
