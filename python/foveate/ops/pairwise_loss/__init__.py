"""Sigmoid (SigLIP) and softmax (CLIP, InfoNCE) losses over all pairs of two sets of rows."""
