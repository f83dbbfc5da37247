"""A simulated machine and simulated engines, as separate processes, for the demo and the tests.

They speak the real protocols and say of themselves that they are simulated. Nothing is imported
here: an engine is a process of its own and should start at once.
"""
