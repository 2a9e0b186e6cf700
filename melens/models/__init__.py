"""Models: loading them, and one view of a TransformerBridge and of a plain transformers model."""
