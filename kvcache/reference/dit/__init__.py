"""A small diffusion transformer in float32 over the array API, and toy data for it.

``model``       the transformer, a sampler and guidance
``blocks``      its sizes and its computation, as pure functions
``toy_shapes``  samples to train it on, and their distance from the data
"""
