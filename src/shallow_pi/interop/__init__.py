"""The only files that import openpi or lerobot, lazily."""
