"""Time saved, and error made, by caches across denoising steps."""
