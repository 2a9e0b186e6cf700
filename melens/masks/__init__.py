"""WeMask: what is masked, the hooks that do it, and what it does to the model."""
