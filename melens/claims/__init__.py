"""The claims of the paper and its review, as data, and how a measured value becomes a verdict."""
