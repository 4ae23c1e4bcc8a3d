"""Claims about the method, each a study of many small policies on the tabletop suite."""
