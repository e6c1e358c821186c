"""A small diffusion transformer and the toy shapes that it draws."""
