"""Time and operations, measured side by side: one inference, one training step."""
