"""Simulators behind one small interface, each with its expert."""
