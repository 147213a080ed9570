"""Normalized cut of token graphs: the second eigenvector and the masks made from it."""
