"""The public functions of the pairwise losses."""
