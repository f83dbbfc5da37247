"""What the demo and the tests have instead of the outside world, as processes of their own.

`python -m controlplane.simulators.cloud` is a cloud model API that costs nothing.
"""
