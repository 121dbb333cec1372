"""What a diffusers folder runs: each file here is bundled with those parts of `mm` that it uses (`mm.interop.bundle`).

Nothing of `mm` imports them, which is why they may import diffusers at their top.
"""
