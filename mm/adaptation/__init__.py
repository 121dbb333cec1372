"""What of a model trains: all of it, parts of it, or small matrices beside it."""

from mm.adaptation.freeze import apply

__all__ = ["apply"]
