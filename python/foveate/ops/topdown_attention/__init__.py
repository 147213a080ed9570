"""Top-down attention: feedback added to the values of attention (TOAST, 2023; AbSViT, 2023)."""
