"""Protocols that measure frozen features. Start at ``suite.evaluate_backbone``."""
