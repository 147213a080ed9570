"""The public functions of analog bits."""
