"""The public functions of top-down attention."""
