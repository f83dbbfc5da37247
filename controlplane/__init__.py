"""The control plane: jobs, routing, the fleet, and the APIs in front of them."""
