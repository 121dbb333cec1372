"""The fault suite: a run is started as users start it, something is done to it, and what comes of it is judged."""
