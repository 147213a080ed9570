"""One package per family: api, reference, and the backends that earn their place."""
