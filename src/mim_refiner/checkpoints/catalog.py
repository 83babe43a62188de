"""What is known about each family of encoders beyond its tensors."""

from __future__ import annotations

# Licence of the weights that the family's authors published (not of our code, nor of weights that others trained).
FAMILY_LICENCES = {
    "mae": "CC-BY-NC-4.0",
}
UNKNOWN_LICENCE = "unknown"


def family_licence(family: str) -> str:
    """Licence of the family's published weights, "unknown" where a file alone does not tell."""
    return FAMILY_LICENCES.get(family, UNKNOWN_LICENCE)
