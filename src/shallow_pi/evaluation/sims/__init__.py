"""Simulators behind one small interface, with their scripted experts."""
