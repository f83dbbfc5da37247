"""The effort ladder: who answers a request. So far, the choice among the deployments of a model."""

from controlplane.ladder._order import Target, explain_targets, order_targets, refusal

__all__ = ["Target", "explain_targets", "order_targets", "refusal"]
