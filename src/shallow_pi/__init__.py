"""Distil a π0 or π0.5 policy of openpi into a shallow student.

Parameters and images go in at the bottom, velocities come out of `models/`, students out of
`distill/`, checkpoints out of `training/`, actions out of `deploy/`, and numbers out of
`evaluation/`. CONTRIBUTING.md has the order of the folders. Importing the package starts no device
work and reads no file.
"""
